"""What Megatron is told on a GPU: every recipe, every precision, both layer specs, no GPU needed.

Transformer Engine is not installed where these run: what is looked at is the resolved
configuration, the choice of the spec and its modules. That the real modules have the names of the
layout tables is seen in `tests/gpu`, and was seen once without a GPU (docs/gpu.md).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from megatron.core.extensions import transformer_engine, transformer_engine_spec_provider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend

import recipes
from megatron_precision.actor import models
from megatron_precision.config.errors import UserError
from megatron_precision.config.schema import (
    TRANSFORMER_ENGINE_FUSIONS,
    KernelConfig,
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
)
from megatron_precision.precision.policy import policy

DENSE = ModelConfig(num_hidden_layers=1)
MOE = ModelConfig(
    model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96
)
ONE = ParallelConfig(world_size=1, tp_size=1, rollout_tp_size=1)
SIXTEEN_BITS = {"fp16": torch.float16, "bf16": torch.bfloat16}


@pytest.fixture
def with_te(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where Transformer Engine can be imported; no module of it is built here."""
    monkeypatch.setattr(transformer_engine, "HAVE_TE", True)
    provider = transformer_engine_spec_provider
    monkeypatch.setattr(gpt_layer_specs, "TESpecProvider", provider.TESpecProvider, raising=False)
    monkeypatch.setattr(provider, "is_te_min_version", lambda _version: True)


def on_cuda(
    model: ModelConfig, precision: str, kernels: KernelConfig | None = None, **memory: Any
) -> TransformerConfig:
    return models.transformer_config(
        model, ONE, policy(precision), MemoryConfig(**memory), kernels or KernelConfig(), "cuda"
    )


def dtypes(config: TransformerConfig) -> dict[str, torch.dtype]:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {name: value for name, value in values.items() if isinstance(value, torch.dtype)}


@pytest.mark.usefixtures("with_te")
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32", "bf16/fp16"])
@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_every_recipe_has_one_dtype_and_an_fp32_router(name: str, precision: str) -> None:
    run = recipes.build(name, precision)
    config = models.transformer_config(
        run.model, run.parallel, run.policy, run.memory, run.kernels, "cuda"
    )
    trained = precision.partition("/")[0]
    expected = SIXTEEN_BITS.get(trained, torch.float32)
    found = dtypes(config)
    assert {"params_dtype", "pipeline_dtype", "autocast_dtype"} <= set(found)
    assert set(found.values()) == {expected}
    assert (config.fp16, config.bf16) == (trained == "fp16", trained == "bf16")
    assert config.fp8 is None
    assert not config.first_last_layers_bf16
    # Megatron's fused cross entropy casts its backward to BF16.
    assert not config.cross_entropy_loss_fusion
    assert not config.use_cpu_initialization
    if run.model.num_experts:
        assert config.moe_router_dtype == "fp32"
        assert config.moe_grouped_gemm


@pytest.mark.usefixtures("with_te")
@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_fp16_and_bf16_configs_differ_in_the_dtype_alone(name: str) -> None:
    first, second = (
        dataclasses.asdict(
            models.transformer_config(
                run.model, run.parallel, run.policy, run.memory, run.kernels, "cuda"
            )
        )
        for run in (recipes.build(name, "fp16"), recipes.build(name, "bf16"))
    )
    # Functions are made anew for each config; they draw by the same deviation.
    plain = [key for key, value in first.items() if not callable(value)]
    differing = {key for key in plain if first[key] != second[key]}
    assert differing == {"params_dtype", "pipeline_dtype", "autocast_dtype", "fp16", "bf16"}


@pytest.mark.usefixtures("with_te")
def test_each_fusion_is_switched_by_itself() -> None:
    def fusions(kernels: KernelConfig) -> dict[str, bool]:
        config = on_cuda(MOE, "fp16", kernels)
        return {
            field.name: value
            for field in dataclasses.fields(config)
            if "fusion" in field.name and (value := getattr(config, field.name)) is True
        }

    # RoPE's switch is handed on: Megatron looks for Transformer Engine's kernel, not here.
    assert fusions(KernelConfig()) == {}
    assert fusions(KernelConfig(fused_activation=True)) == {"bias_activation_fusion": True}
    with pytest.raises(ValueError, match="apply_rope_fusion is not available"):
        on_cuda(DENSE, "fp16", KernelConfig(fused_rope=True))


def test_transformer_engine_is_refused_where_it_cannot_be_used() -> None:
    for kernels, platform in (
        (KernelConfig(), "cuda"),
        (KernelConfig(trainer="transformer_engine"), "cuda"),
        (KernelConfig(trainer="transformer_engine"), "cpu"),
    ):
        with pytest.raises(UserError) as caught:
            models.implementation(kernels, platform)  # type: ignore[arg-type]
        (problem,) = caught.value.problems
        assert problem.where == "kernels.trainer"
        assert "not installed" in problem.got
        assert "kernels.trainer=local" in problem.remedy
    assert models.implementation(KernelConfig(), "cpu") == "local"
    assert models.implementation(KernelConfig(trainer="local"), "cuda") == "local"


def test_weight_gradients_are_fused_where_a_module_can() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].fuse_wgrad_accumulation = False  # type: ignore[assignment]
    models.fuse_weight_gradients(model)
    assert model[0].fuse_wgrad_accumulation is True
    assert not hasattr(model[1], "fuse_wgrad_accumulation")


def test_transformer_engines_fusions_are_refused_without_it() -> None:
    fusions = dict.fromkeys(TRANSFORMER_ENGINE_FUSIONS, True)
    kernels = KernelConfig(trainer="local", **fusions)
    with pytest.raises(UserError) as caught:
        models.implementation(kernels, "cuda")
    found = [problem.where for problem in caught.value.problems]
    assert found == [f"kernels.{name}" for name in TRANSFORMER_ENGINE_FUSIONS]


@pytest.mark.usefixtures("with_te")
def test_the_spec_is_transformer_engines_with_fused_norms() -> None:
    dense = models.layer_spec(DENSE, on_cuda(DENSE, "fp16"), MemoryConfig(), "transformer_engine")
    attention = dense.submodules.self_attention.submodules
    assert attention.linear_qkv is transformer_engine.TELayerNormColumnParallelLinear
    assert attention.core_attention is transformer_engine.TEDotProductAttention
    assert attention.linear_proj is transformer_engine.TERowParallelLinear
    assert attention.q_layernorm is transformer_engine.TENorm
    # Grouped experts need a class that Megatron defines only beside Transformer Engine.
    assert on_cuda(MOE, "fp16").moe_grouped_gemm
    local = models.layer_spec(DENSE, on_cuda(DENSE, "fp16"), MemoryConfig())
    assert "TE" not in local.submodules.self_attention.submodules.linear_qkv.__name__


@pytest.mark.usefixtures("with_te")
def test_attention_that_writes_scores_is_transformer_engines_unfused_one() -> None:
    assert on_cuda(DENSE, "fp16").attention_backend == AttnBackend.unfused
    assert on_cuda(DENSE, "fp16", attention="fused").attention_backend == AttnBackend.auto


@pytest.mark.usefixtures("with_te")
def test_selective_recomputation_names_its_parts() -> None:
    config = on_cuda(MOE, "fp16", recompute="selective", recompute_modules=("layernorm", "moe_act"))
    assert config.recompute_granularity == "selective"
    assert config.recompute_modules == ["layernorm", "moe_act"]
