"""What the ranks do in tests of the engine's memory. Each public function runs on every rank."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.distributed as dist

from megatron_precision.config.schema import RunConfig
from megatron_precision.rollout.engine_weights import EngineWeights
from tests.distributed.engine_bodies import open_session


def engine_footprint(
    config: RunConfig, tensors: dict[str, torch.Tensor], folder: str
) -> list[dict[str, int]]:
    """What every rank's engine and sync hold after a push, in bytes.

    Weights are counted in the shapes that vLLM's loader gives its parameters: where a CPU kernel
    keeps a packed copy, as many elements of it.
    """
    session = open_session(config, tensors, folder)
    session.sync.push(1)
    transfer, caches = session.sync.transfer, session.engine.kv_caches
    parameters = EngineWeights(session.engine.model, None).parameters
    held = {
        "weights": caches[0].itemsize * sum(math.prod(p.shape) for p in parameters),
        "kv_cache": sum(cache.nbytes for cache in caches),
        "buffers": transfer.transport.buffer_bytes,
        "copied": transfer.transport.bytes - transfer.transport.received_bytes,
        "received": transfer.transport.received_bytes,
    }
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, held)
    return everyone
