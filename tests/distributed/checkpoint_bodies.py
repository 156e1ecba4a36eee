"""What the ranks do in tests of the converter: Megatron's own loading and saving."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import dist_checkpointing

from megatron_precision.actor.parallel import divide_world, open_world
from megatron_precision.config.schema import RunConfig
from megatron_precision.layouts.architectures import hf_shapes
from megatron_precision.platform.startup import start
from megatron_precision.rollout.vllm_engine import VllmEngine
from megatron_precision.train.warm_start import full_tensors
from tests.distributed.actor_bodies import make_actor


def load_and_save(config: RunConfig, source: str, target: str | None) -> dict[str, torch.Tensor]:
    """Load a converted checkpoint at this layout; returns it as Hugging Face tensors in FP32.

    Args:
        source: a folder that the converter wrote.
        target: where Megatron writes it again, at this layout.
    """
    zeros = {name: torch.zeros(shape) for name, shape in hf_shapes(config.model).items()}
    actor = make_actor(config, zeros)
    module = actor.model.module
    loaded = dist_checkpointing.load(module.sharded_state_dict(), source)
    module.load_state_dict(loaded)
    if target is not None:
        if torch.distributed.get_rank() == 0:
            Path(target).mkdir()
        torch.distributed.barrier()
        dist_checkpointing.save(module.sharded_state_dict(), target)
    gathered = full_tensors(actor, config.model)
    return {name: tensor.float().clone() for name, tensor in gathered.items()}


def engine_scores(config: RunConfig, folder: str, prompts: list[list[int]]) -> list[list[float]]:
    """Log-probs of each prompt's tokens but the first, by vLLM from a folder as it stands."""
    start(config.seed)
    open_world("gloo")
    divide_world(config.parallel, config.seed)
    engine = VllmEngine(config, Path(folder), stop_ids=(0,))
    return engine.score(prompts)
