"""Sampling with the real engine on two ranks, and its mismatch with the real trainer."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from megatron_precision.config.schema import KernelConfig
from megatron_precision.platform import wide_products
from tests.distributed.engine_worlds import (
    config,
    engine_world,
    every_world,
    mismatch_world,
    weights,
)
from tests.distributed.harness import run_distributed


@every_world
def test_the_same_seeds_give_the_same_tokens_whatever_is_submitted_with_them(world: str) -> None:
    first, again, *others = engine_world(world)["submissions"]
    assert len(first) == 16
    assert len(set(first.values())) > 12
    assert again == first
    # In two halves, one by one while others run, and in reverse. A BF16 product taken wide can
    # round otherwise in its last bit for another number of rows, and now and then turn a draw.
    rounds_otherwise = "bf16" in world and torch.bfloat16 in wide_products.not_native()
    alike = 14 if rounds_otherwise else 16
    assert len(others) == 3
    for other in others:
        assert other.keys() == first.keys()
        assert sum(other[request] == tokens for request, tokens in first.items()) >= alike


@every_world
def test_logprobs_are_those_that_vllm_records(world: str) -> None:
    ours, vllms = engine_world(world)["recorded"]
    assert sum(map(len, ours.values())) > 200
    assert ours == vllms


@every_world
def test_ranks_that_sample_different_tokens_are_told_apart(world: str) -> None:
    message = engine_world(world)["disagreement"]
    assert "rank 1 sampled other tokens than rank 0" in message


def mean_difference(logprobs: dict[str, torch.Tensor]) -> float:
    """Mean absolute difference of engine and trainer over the sampled tokens."""
    assert logprobs["engine"].numel() > 500
    return float((logprobs["engine"].double() - logprobs["trainer"].double()).abs().mean())


@every_world
def test_engine_and_trainer_differ_by_rounding_alone(world: str) -> None:
    found = engine_world(world)["mismatch"]
    bound = {"fp16": 5e-3, "bf16": 5e-2}[world.split()[1]]
    # Exactly equal would mean that one engine was compared with itself.
    assert 1e-5 < mean_difference(found) < bound


@pytest.mark.slow
@pytest.mark.parametrize("model", ["dense", "MoE"])
def test_the_mismatch_is_a_matter_of_the_dtype(model: str) -> None:
    fp32, fp16, bf16 = (
        mean_difference(mismatch_world(f"{model} {precision}"))
        for precision in ("fp32", "fp16", "bf16")
    )
    assert 1e-8 < fp32 < 1e-5
    # BF16 has three bits of mantissa less: its rounding errors are 8 times as large.
    assert 4 < bf16 / fp16 < 16


@pytest.mark.slow
def test_heads_in_fp32_are_synced_and_proven_where_their_weights_are(tmp_path: Path) -> None:
    plain = config("dense bf16")
    tied = dataclasses.replace(plain.model, tie_word_embeddings=True)
    wide = dataclasses.replace(plain, model=tied, kernels=KernelConfig(fp32_lm_head=True))
    tensors = {name: t for name, t in weights("dense").items() if name != "lm_head.weight"}
    found = run_distributed("engine_bodies.wide_heads", 2, wide, tensors, str(tmp_path))
    assert found["dtypes"]["lm_head"] == found["dtypes"]["rollout_lm_head"] == "fp32"
    assert found["dtypes"]["params"] == found["dtypes"]["rollout_params"] == "bf16"
    assert found["logits"] == ["torch.float32"]
    # What is left is the layers' rounding.
    assert 1e-5 < mean_difference(found["mismatch"]) < 5e-2
