"""One GPU: kernels, layer specs, sync and memory. `make test-gpu` runs them, in minutes.

Nothing here has been run on a GPU yet (docs/gpu.md). Not covered: several ranks, which cannot
share a GPU over NCCL and are tested on gloo.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import Case
from engine_worlds import DENSE, MOE, weights
from engine_worlds import config as world_config
from harness import run_distributed
from oracle import checkpoint, logprobs_of, random_batch, random_hf_model

from megatron_precision.config import (
    KernelConfig,
    LossScaleConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    SyncConfig,
    TrainConfig,
)
from megatron_precision.platform import cuda
from megatron_precision.weights.megatron_layout import megatron_parameters, padded_vocab_size

pytestmark = pytest.mark.gpu
ONE = ParallelConfig(world_size=1, tp_size=1, rollout_tp_size=1)
MODELS = {"dense": DENSE, "MoE": MOE}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
every_model = pytest.mark.parametrize("model", list(MODELS))
both_dtypes = pytest.mark.parametrize("precision", list(DTYPES))


@pytest.fixture(autouse=True)
def _needs_a_gpu() -> None:
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")


def case(
    model: ModelConfig, precision: str, trainer: str = "transformer_engine", packed: bool = False
) -> Case:
    config = RunConfig(
        "test",
        precision=precision,
        model=model,
        parallel=ONE,
        optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-8),
        loss_scale=LossScaleConfig("fixed_start", initial_scale=64.0),
        train=TrainConfig(micro_batch_size=3, packed_sequences=packed),
        memory=MemoryConfig(attention="fused"),
        kernels=KernelConfig(trainer=trainer),  # type: ignore[arg-type]
    )
    return Case(config, checkpoint(model, random_hf_model(model, 0.1)), random_batch(model, 6))


# ---- kernels against FP64 ----------------------------------------------------------------


@pytest.fixture
def exact_sums() -> None:
    cuda.set_exact_accumulation()


@both_dtypes
@pytest.mark.usefixtures("exact_sums")
def test_a_long_product_is_summed_in_fp32(precision: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(48, 16384, generator=generator).to(DTYPES[precision])
    b = torch.randn(16384, 80, generator=generator).to(DTYPES[precision])
    exact = a.double() @ b.double()
    got = (a.cuda() @ b.cuda()).double().cpu()
    # One rounding of the result, and the noise of an FP32 sum; sums in FP16 are 10 times worse.
    eps = torch.finfo(DTYPES[precision]).eps
    noise = 16384 * 2**-24 * math.sqrt(16384)
    assert ((got - exact).abs() <= eps / 2 * exact.abs() * 1.01 + noise).all()


@both_dtypes
@pytest.mark.usefixtures("exact_sums")
def test_transformer_engines_long_product_is_summed_in_fp32(precision: str) -> None:
    te = pytest.importorskip("transformer_engine.pytorch")
    generator = torch.Generator().manual_seed(0)
    linear = te.Linear(16384, 80, bias=False, params_dtype=DTYPES[precision], device="cuda")
    a = torch.randn(48, 16384, generator=generator).to(DTYPES[precision])
    exact = a.double() @ linear.weight.detach().double().cpu().t()
    with torch.no_grad():
        got = linear(a.cuda()).double().cpu()
    eps = torch.finfo(DTYPES[precision]).eps
    noise = 16384 * 2**-24 * float(exact.abs().max())
    assert ((got - exact).abs() <= eps / 2 * exact.abs() * 1.01 + noise).all()


@both_dtypes
def test_transformer_engines_norm_rounds_once(precision: str) -> None:
    te = pytest.importorskip("transformer_engine.pytorch")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 256, generator=generator).to(DTYPES[precision])
    norm = te.RMSNorm(256, eps=1e-6, params_dtype=DTYPES[precision], device="cuda")
    wide = x.double()
    exact = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    eps = torch.finfo(DTYPES[precision]).eps
    error = (norm(x.cuda()).double().cpu() - exact).abs() / exact.abs().clamp(min=1e-3)
    assert error.max() <= 1.1 * eps


@both_dtypes
def test_fused_attention_is_as_close_to_fp64_as_the_dtype_allows(precision: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 96, 64, generator=generator) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    cast = [x.to(DTYPES[precision]) for x in (q, k, v)]
    exact = attend(*(x.double() for x in cast), is_causal=True)
    got = attend(*(x.cuda() for x in cast), is_causal=True).double().cpu()
    assert (got - exact).abs().max() <= 4 * torch.finfo(DTYPES[precision]).eps


# ---- Transformer Engine against the local spec -------------------------------------------


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


# ---- overflow, sync, memory --------------------------------------------------------------


@every_model
def test_a_step_that_overflows_changes_nothing_but_the_scale(model: str) -> None:
    found = run_distributed("gpu_bodies.overflow", 1, case(MODELS[model], "fp16"))
    assert found["steps"] == [(False, True, 64.0), (True, False, 32.0), (False, True, 32.0)]
    assert found["applied"] == 2


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
