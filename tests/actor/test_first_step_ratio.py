"""Equal micro-batches round alike: the first step's ratio is one, in every dtype and layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from megatron_precision.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from tests.distributed.cases import Case
from tests.distributed.harness import run_distributed
from tests.distributed.oracle import DENSE, MOE, checkpoint, random_batch, random_hf_model

PADDED = TrainConfig(micro_batch_tokens=50)
PACKED = TrainConfig(micro_batch_tokens=50, packed_sequences=True)
LAYOUTS: dict[str, tuple[ModelConfig, ParallelConfig, TrainConfig]] = {
    "dense TP2 SP": (DENSE, ParallelConfig(2, 2, sequence_parallel=True), PADDED),
    "dense PP2": (DENSE, ParallelConfig(2, 1, 2), PADDED),
    "MoE EP2": (MOE, ParallelConfig(2, 1, 1, 2), PADDED),
    "dense TP2 SP packed": (DENSE, ParallelConfig(2, 2, sequence_parallel=True), PACKED),
}
PRECISIONS = ("fp16", "bf16", "fp32")
# How far a dtype's log-probs may lie from FP32's, on average: it must really have been used.
COARSE = {"fp16": (1e-5, 1e-1), "bf16": (1e-4, 1.0), "fp32": (-1.0, 1e-5)}
NAMES = [f"{layout}, {precision}" for layout in LAYOUTS for precision in PRECISIONS]


@pytest.fixture(scope="module")
def passes() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    cases = {}
    for layout, (model, parallel, train) in LAYOUTS.items():
        tensors = checkpoint(model, random_hf_model(model))
        for precision in PRECISIONS:
            config = RunConfig(
                "test",
                precision=precision,
                model=model,
                parallel=parallel,
                train=train,
            )
            cases[f"{layout}, {precision}"] = Case(config, tensors, random_batch(model, 10))
    result: dict[str, tuple[torch.Tensor, torch.Tensor]] = run_distributed(
        "actor_bodies.both_passes", 2, cases
    )
    return result


@pytest.mark.parametrize("name", NAMES)
def test_the_ratio_of_the_first_step_is_exactly_one(passes: Any, name: str) -> None:
    old, train = passes[name]
    assert old.abs().max() > 1
    assert torch.equal((train - old).exp(), torch.ones_like(old))


@pytest.mark.parametrize("name", NAMES)
def test_the_passes_ran_in_the_dtype_that_was_asked_for(passes: Any, name: str) -> None:
    layout, _, precision = name.partition(", ")
    difference = float((passes[name][0] - passes[f"{layout}, fp32"][0]).abs().mean())
    low, high = COARSE[precision]
    assert low < difference < high
