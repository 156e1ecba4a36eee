"""The output projection in FP32: against FP64 on the hidden states that it really multiplied."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from megatron_precision.config.schema import (
    KernelConfig,
    LossScaleConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
)
from tests.distributed.cases import Case
from tests.distributed.harness import run_distributed
from tests.distributed.oracle import DENSE, checkpoint, random_batch, random_hf_model

TIED = dataclasses.replace(DENSE, tie_word_embeddings=True)
MODELS = {"own weight": DENSE, "the embedding's": TIED}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
BATCH = random_batch(DENSE, 6)
NAMES = [f"{model}, {precision}" for model in MODELS for precision in DTYPES]


def case(model: ModelConfig, parallel: ParallelConfig, precision: str, head: str) -> Case:
    config = RunConfig(
        "test",
        precision=precision,
        model=model,
        parallel=parallel,
        rollout=RolloutConfig(temperature=1.0),
        loss_scale=LossScaleConfig("fixed_start", initial_scale=64.0),
        kernels=KernelConfig(fp32_lm_head=head == "wide"),
    )
    return Case(config, checkpoint(model, random_hf_model(model)), BATCH)


def worst(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> float:
    """The largest ||got - want|| / ||want|| of a tensor."""
    return max(
        float((got[name] - values).double().norm() / values.double().norm())
        for name, values in want.items()
    )


@functools.cache
def found() -> dict[str, Any]:
    cases = {}
    for name in NAMES:
        model, precision = name.split(", ")
        for head in ("wide", "plain"):
            cases[f"{name}, {head}"] = case(MODELS[model], ParallelConfig(2, 2), precision, head)
    results: dict[str, Any] = run_distributed("actor_bodies.head_passes", 2, cases)
    return results


def exact_logprobs(name: str, result: dict[str, Any]) -> torch.Tensor:
    """[S, L] FP64, zero outside the response."""
    model, precision = MODELS[name.split(", ")[0]], name.split(", ")[1]
    tensors = checkpoint(model, random_hf_model(model))
    weight = tensors["model.embed_tokens.weight" if model is TIED else "lm_head.weight"]
    logits = result["hidden"].double() @ weight.to(DTYPES[precision]).double().t()
    length = BATCH.tokens.shape[1]
    logprobs = logits[:, : length - 1].log_softmax(-1)
    exact = torch.zeros(BATCH.tokens.shape, dtype=torch.float64)
    targets = BATCH.tokens[result["rows"], 1:, None]
    exact[result["rows"], 1:] = logprobs.gather(-1, targets)[..., 0]
    return exact * BATCH.response_mask


@pytest.mark.parametrize("name", NAMES)
def test_a_wide_head_rounds_nothing_and_a_plain_one_does(name: str) -> None:
    wide, plain = found()[f"{name}, wide"], found()[f"{name}, plain"]
    exact = exact_logprobs(name, wide)
    assert exact.abs().max() > 1
    assert torch.equal(wide["hidden"], plain["hidden"])
    wide_error, plain_error = ((r["logprobs"] - exact).abs().max() for r in (wide, plain))
    assert wide_error < 1e-5
    assert plain_error > 100 * wide_error


LAYOUTS = {
    "TP2 SP": (DENSE, ParallelConfig(2, 2, sequence_parallel=True)),
    "PP2, the embedding's": (TIED, ParallelConfig(2, 1, 2)),
}


@functools.cache
def elsewhere() -> dict[str, Any]:
    cases = {
        f"{name}, {head}": case(model, parallel, "fp16", head)
        for name, (model, parallel) in LAYOUTS.items()
        for head in ("wide", "plain")
    }
    results: dict[str, Any] = run_distributed("actor_bodies.passes", 2, cases)
    return results


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_every_layout_gives_its_log_probs_and_gradients(layout: str) -> None:
    wide, plain = elsewhere()[f"{layout}, wide"], elsewhere()[f"{layout}, plain"]
    name = (
        "own weight, fp16, wide" if LAYOUTS[layout][0] is DENSE else "the embedding's, fp16, wide"
    )
    torch.testing.assert_close(wide["logprobs"], found()[name]["logprobs"], rtol=0, atol=2e-2)
    assert not torch.equal(wide["logprobs"], plain["logprobs"])
    assert worst(wide["gradients"], plain["gradients"]) < 0.02


@pytest.mark.parametrize("name", NAMES)
def test_gradients_below_a_wide_head_are_those_of_the_model(name: str) -> None:
    wide, plain = found()[f"{name}, wide"]["gradients"], found()[f"{name}, plain"]["gradients"]
    assert worst(wide, plain) < {"fp16": 0.02, "bf16": 0.1}[name.split(", ")[1]]
