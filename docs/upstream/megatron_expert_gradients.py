"""Megatron Core 0.16.1: which weights of an MoE model are reduced over the experts' group.

    torchrun --nproc-per-node 2 docs/upstream/megatron_expert_gradients.py

Prints for EP 1 and EP 2 (TP 2, expert TP 1) whether an expert's weight is marked for it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_precision.actor.models import build_model, transformer_config
from megatron_precision.actor.parallel import divide_world, open_world
from megatron_precision.config.schema import MemoryConfig, ModelConfig, ParallelConfig
from megatron_precision.platform.startup import start
from megatron_precision.precision.policy import policy

MODEL = ModelConfig(model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2)


def main() -> None:
    start(1)
    open_world("gloo")
    for ep_size in (1, 2):
        from megatron.core import parallel_state

        if parallel_state.model_parallel_is_initialized():
            parallel_state.destroy_model_parallel()
        layout = ParallelConfig(2, 2, 1, ep_size, sequence_parallel=True)
        divide_world(layout, 1)
        config = transformer_config(MODEL, layout, policy("fp32"), MemoryConfig())
        module = build_model(MODEL, layout, config, MemoryConfig())
        found = {p.allreduce for n, p in module.named_parameters() if ".experts." in n}
        groups = parallel_state.get_expert_data_parallel_world_size()
        if dist.get_rank() == 0:
            print(
                f"EP {ep_size}: an expert's weight lies on {groups} ranks; reduced over the dense "
                f"group of {parallel_state.get_data_parallel_world_size()}: {found}"
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
