"""Sync, sleep and the trainer's stepping aside on one GPU, bit for bit.

Not covered: several ranks, which cannot share a GPU over NCCL and are tested on gloo.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from megatron_precision.config.schema import MemoryConfig, RunConfig, SyncConfig
from tests.distributed.engine_worlds import config as world_config
from tests.distributed.engine_worlds import weights
from tests.distributed.harness import run_distributed
from tests.gpu.one_gpu import ONE, both_dtypes, every_model

pytestmark = pytest.mark.gpu


def both_sides(model: str, precision: str, **changes: Any) -> RunConfig:
    return dataclasses.replace(world_config(f"{model} {precision}"), parallel=ONE, **changes)


@every_model
@both_dtypes
def test_a_sync_is_proven_and_a_flipped_bit_is_named(
    model: str, precision: str, tmp_path: Path
) -> None:
    config = both_sides(model, precision)
    found = run_distributed("gpu_bodies.proven_sync", 1, config, weights(model), str(tmp_path))
    assert found["device"] == "cuda"
    assert found["dtypes"]["params"] == found["dtypes"]["rollout_params"] == precision
    assert found["regions"] > 0
    assert found["checked"] > 0
    assert found["unnoticed"] == []
    assert found["after"] == ""


@pytest.mark.parametrize("sleep", ["keep_weights", "drop_weights"])
@pytest.mark.parametrize(
    ("wire", "on_host"), [("parameters", 0.0), ("main_copies", 0.0), ("parameters", 0.5)]
)
def test_both_sides_step_aside_and_come_back_bit_for_bit(
    sleep: Any, wire: Any, on_host: float, tmp_path: Path
) -> None:
    memory = MemoryConfig(
        attention="fused", engine_sleep=sleep, offload_trainer=True, optimizer_offload=on_host
    )
    config = both_sides("dense", "fp16", memory=memory, sync=SyncConfig(wire))
    found = run_distributed("gpu_bodies.turns", 1, config, weights("dense"), str(tmp_path))
    assert found["trainer"] == []
    assert found["engine"] == []
    assert found["scores"]
    free = found["free"]
    # The KV cache of 32 MiB is given back.
    assert free["trainer's turn"] - free["engine's turn"] > 16 * 2**20
