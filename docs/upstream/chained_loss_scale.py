"""Megatron Core 0.16.1: the loss scales of a ChainedOptimizer drift apart.

A small FP16 MoE model under expert parallelism 2. Twice, an inf is written into the gradient of
one dense parameter; the experts' gradients are finite all the time. Prints each chain member's
loss scale after every step, then the factor by which the experts' gradients are wrong.

    torchrun --standalone --nproc-per-node 2 docs/upstream/chained_loss_scale.py

Nothing of this project is used but its platform patches, which let Megatron Core run on a CPU.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
warnings.filterwarnings("ignore")

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_precision.platform.startup import start  # noqa: E402

backend = start(0)

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402

HALF = torch.float16


def build() -> DistributedDataParallel:
    """One MoE layer, four experts, two of them on each rank."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=16,
        num_attention_heads=2,
        ffn_hidden_size=32,
        num_moe_experts=4,
        moe_router_topk=2,
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        expert_model_parallel_size=2,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        params_dtype=HALF,
        fp16=True,
    )
    model = GPTModel(
        config,
        get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False),
        vocab_size=64,
        max_sequence_length=16,
        position_embedding_type="rope",
    )
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=True)
    return DistributedDataParallel(config, ddp, model.half())


def step(model: DistributedDataParallel, optimizer, spoil: bool):  # type: ignore[no-untyped-def]
    """Forward, backward and `optimizer.step()`; what it returned."""
    model.zero_grad_buffer()
    optimizer.zero_grad()
    tokens = torch.arange(8)[None] + dist.get_rank()
    logits = model(tokens, torch.arange(8)[None], attention_mask=None)
    optimizer.scale_loss(logits.float().logsumexp(-1).sum()).backward()
    finalize_model_grads([model])
    if spoil:
        # The dense parameters' buffer; the experts' is model.expert_parallel_buffers.
        model.buffers[0].grad_data.fill_(float("inf"))
    return optimizer.step()


def main() -> None:
    dist.init_process_group(backend)
    parallel_state.initialize_model_parallel(expert_model_parallel_size=2)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    model = build()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            fp16=True,
            params_dtype=HALF,
            initial_loss_scale=32768.0,
            hysteresis=2,
            use_distributed_optimizer=True,
        ),
        [model],
    )
    scales = []
    for number in range(3):
        applied, _, _ = step(model, optimizer, spoil=number < 2)
        scales = [member.grad_scaler.scale.item() for member in optimizer.chained_optimizers]
        if dist.get_rank() == 0:
            what = "overflow in dense gradients" if number < 2 else "no overflow"
            print(f"step {number}: {what}; applied: {applied}; scales: {scales}", flush=True)
    if dist.get_rank() == 0:
        # The loss is scaled by the first member's scale, the experts unscale by their own.
        print(f"expert gradients are off by a factor of {scales[0] / scales[1]}", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    main()
