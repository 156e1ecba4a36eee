"""The plan against what real Megatron ranks hold: two processes, three layouts.

Parameters, gradients and optimizer state are counted after a step, and what autograd keeps at a
time while it runs. Not covered: a GPU's allocator, NCCL, and the engine's own memory.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch

from megatron_precision.actor.batch import make_batch
from megatron_precision.config.schema import (
    KernelConfig,
    LossScaleConfig,
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
)
from megatron_precision.preflight import memory
from tests.distributed.cases import Case
from tests.distributed.harness import run_distributed
from tests.distributed.oracle import checkpoint, random_hf_model

DENSE = ModelConfig(
    vocab_size=200,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
)
MOE = dataclasses.replace(
    DENSE,
    model_type="qwen3_moe",
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=64,
)
TIED = dataclasses.replace(DENSE, model_type="llama", tie_word_embeddings=True)
LAYOUTS = {
    "TP": (DENSE, ParallelConfig(2, 2, sequence_parallel=True)),
    "PP": (TIED, ParallelConfig(2, 1, 2, rollout_tp_size=1)),
    "EP": (MOE, ParallelConfig(2, 1, 1, 2)),
}
PROMPT, RESPONSE = 24, 40
FULL, NONE = MemoryConfig("full", attention="fused"), MemoryConfig("none", attention="fused")
# Megatron starts every parameter at a multiple of 64 elements, and pads a bucket.
PADDING_ELEMENTS = 64


def case(layout: str, saving: MemoryConfig, precision: str = "bf16", **changed: Any) -> Case:
    model, parallel = LAYOUTS[layout]
    count = 2 * parallel.dp_size
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 200, (count, PROMPT + RESPONSE), generator=generator).tolist()
    config = RunConfig(
        "test",
        precision=precision,
        model=model,
        parallel=parallel,
        task=TaskConfig(max_prompt_tokens=PROMPT),
        rollout=RolloutConfig(max_response_tokens=RESPONSE),
        loss_scale=LossScaleConfig("fixed_start", initial_scale=64.0),
        train=TrainConfig(
            prompts_per_iteration=count,
            prompts_per_mini_batch=count,
            rollouts_per_prompt=1,
            micro_batch_size=1,
        ),
        memory=saving,
    )
    config = dataclasses.replace(config, **changed)
    batch = make_batch(
        [row[:PROMPT] for row in tokens],
        [row[PROMPT:] for row in tokens],
        [[0.1] * RESPONSE] * count,
        torch.ones(count),
    )
    return Case(config, checkpoint(model, random_hf_model(model, 0.1)), batch)


@functools.cache
def cases() -> dict[str, Case]:
    found = {}
    for layout in LAYOUTS:
        found[f"{layout} none"] = case(layout, NONE)
        found[f"{layout} full"] = case(layout, FULL)
    found["TP scores"] = case("TP", MemoryConfig("none", attention="scores"))
    wide = KernelConfig(fp32_lm_head=True)
    found["TP wide head"] = case("TP", NONE, kernels=wide)
    found["PP wide head"] = case("PP", NONE, kernels=wide)
    train = dataclasses.replace(found["TP none"].config.train, packed_sequences=True)
    train = dataclasses.replace(train, micro_batch_size=2)
    found["TP packed"] = case("TP", NONE, train=train)
    found["EP fp32"] = case("EP", NONE, "fp32")
    return found


@functools.cache
def world() -> dict[str, dict[str, Any]]:
    fp32 = {
        "kept": case("TP", NONE, "fp32"),
        "run again": case("TP", FULL, "fp32"),
    }
    found: dict[str, dict[str, Any]] = run_distributed(
        "memory_bodies.footprints_and_gradients", 2, cases(), fp32
    )
    return found


def pairs(name: str) -> list[tuple[memory.Memory, dict[str, int]]]:
    config = cases()[name].config
    stages = range(2) if config.parallel.pp_size == 2 else (0, 0)
    plans = [memory.of_stage(config, stage, "cpu") for stage in stages]
    return list(zip(plans, world()["footprints"][name], strict=True))


def _saved(name: str, plan: memory.Memory) -> int:
    """What the plan says autograd keeps: without the gradients of the layer in its backward."""
    return plan.activations - memory.layer_activations(cases()[name].config, "cpu") + plan.logits


@pytest.mark.parametrize("name", list(cases()))
def test_parameters_gradients_and_optimizer_are_those_of_every_rank(name: str) -> None:
    for plan, held in pairs(name):
        assert plan.parameters == held["parameters"]
        padding = 4 * PADDING_ELEMENTS * (held["named"] + 2)
        assert 0 <= held["gradients"] - plan.gradients <= padding
        # Ranks share the state in whole ranges of padded buckets.
        assert abs(held["optimizer"] - plan.optimizer) <= 3 * padding


@pytest.mark.parametrize("name", [n for n in cases() if not n.startswith("EP")])
def test_activations_are_no_more_than_planned_and_not_much_less(name: str) -> None:
    for plan, held in pairs(name):
        assert 0.55 * _saved(name, plan) < held["saved"] <= _saved(name, plan)


@pytest.mark.parametrize("name", [n for n in cases() if n.startswith("EP")])
def test_activations_of_experts_leave_room_for_an_uneven_router(name: str) -> None:
    for plan, held in pairs(name):
        assert 0.4 * _saved(name, plan) < held["saved"] <= _saved(name, plan)


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_a_layer_run_again_keeps_its_input_alone(layout: str) -> None:
    for (_, none), (_, full) in zip(pairs(f"{layout} none"), pairs(f"{layout} full"), strict=True):
        assert full["saved"] < 0.6 * none["saved"]


def test_recomputation_changes_no_gradient() -> None:
    found = world()["gradients"]
    for tensor, gradient in found["kept"].items():
        torch.testing.assert_close(found["run again"][tensor], gradient, rtol=0.0, atol=0.0)
        assert gradient.abs().max() > 0
