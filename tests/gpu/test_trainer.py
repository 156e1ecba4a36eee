"""Transformer Engine's modules against the local ones and transformers, and steps that overflow."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megatron_precision.layouts.megatron import megatron_parameters, padded_vocab_size
from tests.distributed.cases import Case
from tests.distributed.engine_worlds import DENSE
from tests.distributed.harness import run_distributed
from tests.distributed.oracle import logprobs_of, random_hf_model
from tests.gpu.one_gpu import DTYPES, MODELS, both_dtypes, case, every_model

pytestmark = pytest.mark.gpu


@every_model
@both_dtypes
def test_transformer_engines_modules_have_the_names_of_the_tables(
    model: str, precision: str
) -> None:
    found = run_distributed("gpu_bodies.parameters", 1, case(MODELS[model], precision))
    rows = padded_vocab_size(MODELS[model].vocab_size, 1)
    by_table = dict(megatron_parameters(MODELS[model], rows))
    assert {name: shape for name, (shape, _, _) in found.items()} == by_table
    assert {dtype for _, dtype, _ in found.values()} == {str(DTYPES[precision])}
    assert {device for _, _, device in found.values()} == {"cuda"}


@every_model
@both_dtypes
def test_both_specs_compute_the_same_and_what_transformers_does(model: str, precision: str) -> None:
    cases = {name: case(MODELS[model], precision, name) for name in ("transformer_engine", "local")}
    results: dict[str, Any] = run_distributed("actor_bodies.passes", 1, cases)
    fused, local = results["transformer_engine"], results["local"]
    batch = cases["local"].batch
    mask = batch.response_mask
    close = {"fp16": 5e-3, "bf16": 4e-2}[precision]
    assert (fused["logprobs"] - local["logprobs"])[mask].abs().median() < close
    with torch.no_grad():
        rows = [t[:n].tolist() for t, n in zip(batch.tokens, batch.lengths.tolist(), strict=True)]
        exact = logprobs_of(random_hf_model(MODELS[model], 0.1), rows)
    for row, expected in enumerate(exact):
        response = mask[row, 1 : len(expected) + 1]
        got = fused["logprobs"][row, 1 : len(expected) + 1]
        assert (got - expected)[response].abs().median() < close
    for name, gradient in fused["gradients"].items():
        a, b = gradient.double().flatten(), local["gradients"][name].double().flatten()
        assert torch.isfinite(a).all(), name
        similar = torch.nn.functional.cosine_similarity(a, b, dim=0)
        assert b.norm() == 0 or similar > 0.98, name


@every_model
def test_an_fp32_trainer_multiplies_in_fp32(model: str) -> None:
    exact_case = case(MODELS[model], "fp32", "auto")
    found = run_distributed("actor_bodies.passes", 1, {"fp32": exact_case})["fp32"]
    batch = exact_case.batch
    with torch.no_grad():
        rows = [t[:n].tolist() for t, n in zip(batch.tokens, batch.lengths.tolist(), strict=True)]
        exact = logprobs_of(random_hf_model(MODELS[model], 0.1), rows)
    for row, expected in enumerate(exact):
        response = batch.response_mask[row, 1 : len(expected) + 1]
        got = found["logprobs"][row, 1 : len(expected) + 1]
        # TF32 has ten bits: some 1e-3.
        assert (got - expected)[response].abs().max() < 5e-5


@both_dtypes
@pytest.mark.parametrize("packed", [False, True])
def test_fused_attention_is_what_attends(precision: str, packed: bool) -> None:
    chosen = run_distributed("gpu_bodies.attention", 1, case(DENSE, precision, packed=packed))
    assert not chosen["use_unfused_attention"], chosen


@every_model
@both_dtypes
def test_packed_sequences_give_what_padded_ones_do(model: str, precision: str) -> None:
    cases = {str(packed): case(MODELS[model], precision, packed=packed) for packed in (False, True)}
    results: dict[str, Any] = run_distributed("actor_bodies.passes", 1, cases)
    padded, packed = results["False"], results["True"]
    mask = cases["True"].batch.response_mask
    close = {"fp16": 5e-3, "bf16": 4e-2}[precision]
    assert (packed["logprobs"] - padded["logprobs"])[mask].abs().median() < close
    for name, gradient in packed["gradients"].items():
        a, b = gradient.double().flatten(), padded["gradients"][name].double().flatten()
        similar = torch.nn.functional.cosine_similarity(a, b, dim=0)
        assert b.norm() == 0 or similar > 0.98, name


@every_model
@both_dtypes
def test_products_that_add_to_the_gradients_add_the_same(model: str, precision: str) -> None:
    def with_fusion(fused: bool) -> Case:
        plain = case(MODELS[model], precision)
        kernels = dataclasses.replace(plain.config.kernels, fused_weight_gradients=fused)
        config = dataclasses.replace(plain.config, kernels=kernels)
        return dataclasses.replace(plain, config=config)

    cases = {str(fused): with_fusion(fused) for fused in (False, True)}
    results: dict[str, Any] = run_distributed("actor_bodies.passes", 1, cases)
    plain, fused = results["False"], results["True"]
    assert torch.equal(plain["logprobs"], fused["logprobs"])
    for name, gradient in plain["gradients"].items():
        a, b = gradient.double(), fused["gradients"][name].double()
        # Each of two micro-batches rounds once less, and kernels may add in another order.
        assert (a - b).norm() <= 8 * torch.finfo(DTYPES[precision]).eps * a.norm(), name


@every_model
def test_a_step_that_overflows_changes_nothing_but_the_scale(model: str) -> None:
    found = run_distributed("gpu_bodies.overflow", 1, case(MODELS[model], "fp16"))
    assert found["steps"] == [(False, True, 64.0), (True, False, 32.0), (False, True, 32.0)]
    assert found["applied"] == 2
