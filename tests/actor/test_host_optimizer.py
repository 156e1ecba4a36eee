"""An optimizer that is partly, or wholly, on the host takes the steps of one that is not."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from megatron_precision.config.schema import (
    LossScaleConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_precision.layouts.hf_config import hf_config
from tests.distributed.cases import Case
from tests.distributed.harness import run_distributed
from tests.distributed.oracle import DENSE, MOE, checkpoint, random_batch, random_hf_model

ONE = ParallelConfig(world_size=1, tp_size=1, rollout_tp_size=1)


def case(model: ModelConfig, offloaded: float = 0.0) -> Case:
    config = RunConfig(
        "test",
        precision="fp16",
        model=model,
        parallel=ONE,
        optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-8, weight_decay=0.1),
        loss_scale=LossScaleConfig("fixed_start", initial_scale=64.0),
        train=TrainConfig(micro_batch_size=2),
        memory=MemoryConfig(optimizer_offload=offloaded),
    )
    return Case(config, checkpoint(model, random_hf_model(model, 0.2)), random_batch(model, 6))


@pytest.mark.parametrize("model", [DENSE, MOE], ids=["dense", "MoE"])
def test_its_steps_begin_at_the_loaded_weights_and_are_the_same(model: ModelConfig) -> None:
    straight = run_distributed("host_optimizer_bodies.steps", 1, case(model), 0.0)
    assert straight["unlike"] == []
    assert not any(straight["on_host"])
    moved = [
        float((straight["weights"][name].float() - before.float()).abs().max())
        for name, before in case(model).tensors.items()
    ]
    assert min(moved) > 1e-3
    half, whole = (
        run_distributed("host_optimizer_bodies.steps", 1, case(model), share)
        for share in (0.5, 1.0)
    )
    assert 0 < sum(half["on_host"]) < sum(whole["on_host"])
    for found in (half, whole):
        assert found["unlike"] == []
        for name, expected in straight["weights"].items():
            # Two AdamWs of torch's: loop and fused, of steps of 1e-2.
            torch.testing.assert_close(found["weights"][name], expected, rtol=2e-3, atol=1e-4)


def test_its_state_comes_back_from_a_checkpoint(tmp_path: Path) -> None:
    tied = dataclasses.replace(DENSE, tie_word_embeddings=True)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(tied, "float32")))
    folder = str(tmp_path)
    found = run_distributed(
        "host_optimizer_bodies.through_layouts", 1, case(tied, 1.0), folder, [ONE], folder
    )
    assert found["held"] == ["exp_avg", "exp_avg_sq", "param"]
    assert found["differing"] == []
    assert found["applied"] == 3
    for name, straight in found["straight"].items():
        for stepped in found["stepped"].values():
            assert torch.equal(stepped[name], straight), name
