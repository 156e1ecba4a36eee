"""Trainer to engine, with the real engines on two ranks: every way to lose a weight is caught.

Dense models train with TP 2 and roll out with TP 2; MoE models train with EP 2 and roll out with
TP 2. Not covered: replicas of the engine, pipeline stages (see the end-to-end tests).
"""

from __future__ import annotations

import re

import pytest
import torch
from engine_worlds import LAYOUTS, engine_world, every_world
from oracle import logprobs_of

from megatron_precision.weights.hf_model import build_hf_model

# Median absolute difference between the engine and an FP32 forward of the same weights. The mean
# is no measure of an MoE model: where two experts are close, rounding chooses another one.
CLOSE = {"fp16": 3e-3, "bf16": 3e-2}
NAMES = {name: model for name, (model, _) in LAYOUTS.items()}
moe_worlds = pytest.mark.parametrize(
    "world", ["MoE bf16", pytest.param("MoE fp16", marks=pytest.mark.slow)]
)


def engine_name(hf_name: str) -> str:
    """The engine's parameter that holds a Hugging Face tensor, by hand."""
    name = re.sub(r"self_attn\.[qkv]_proj", "self_attn.qkv_proj", hf_name)
    name = re.sub(r"mlp\.(gate|up)_proj", "mlp.gate_up_proj", name)
    name = re.sub(
        r"experts\.\d+\.(gate|up)_proj\.weight", "experts.routed_experts.w13_weight", name
    )
    return re.sub(r"experts\.\d+\.down_proj\.weight", "experts.routed_experts.w2_weight", name)


def named(message: str) -> set[str]:
    """Parameters that an error lists, on whichever rank."""
    return set(re.findall(r"rank \d: (\S+): \d+ of \d+ elements differ", message))


@every_world
def test_after_a_push_the_engine_computes_what_transformers_does(world: str) -> None:
    model, precision = world.split()
    push = engine_world(world)["push"]
    reference = build_hf_model(NAMES[model], push["tensors"])
    with torch.no_grad():
        expected = torch.cat(logprobs_of(reference, push["prompts"]))
    got = torch.cat([torch.tensor(row) for row in push["scores"]])
    before = torch.cat([torch.tensor(row) for row in push["before"]])
    # The weights that it held before are far off: the test could fail.
    assert (before - expected).abs().median() > 0.2
    assert (got - expected).abs().median() < CLOSE[precision]
    assert push["weight_version"] == 7


@every_world
def test_every_parameter_of_the_engine_is_read_back(world: str) -> None:
    # A layer has qkv, o, two MLP stacks, four norms, and an MoE layer its router; then the
    # embedding, the head and the last norm.
    a_layer = 9 if world.startswith("MoE") else 8
    assert engine_world(world)["push"]["verified"] == 2 * a_layer + 3


@every_world
def test_one_wrong_element_of_any_tensor_is_caught_and_its_parameter_named(world: str) -> None:
    damaged = engine_world(world)["damaged"]["one element"]
    assert len(damaged) > 20
    assert {name: named(message) for name, message in damaged.items()} == {
        name: {engine_name(name)} for name in damaged
    }
    assert all(" 1 of " in message for message in damaged.values())


@every_world
def test_an_intact_push_after_damaged_ones_is_accepted(world: str) -> None:
    assert engine_world(world)["damaged"]["intact again"] == ""
    assert engine_world(world)["dtypes again"] == engine_world(world)["dtypes"]


@every_world
def test_a_tensor_that_is_left_out_of_a_push_is_named(world: str) -> None:
    dropped = engine_world(world)["dropped"]
    assert len(dropped) == 3
    for name, message in dropped.items():
        assert named(message) == {engine_name(name)}


@every_world
def test_a_push_that_goes_nowhere_is_caught(world: str) -> None:
    found = engine_world(world)
    # Both ranks list all of their parameters; a rank's vocabulary rows differ too.
    assert len(named(found["damaged"]["lost"])) == found["push"]["verified"]
    assert "elements differ" in found["damaged"]["proof"]


@every_world
def test_the_proof_catches_a_push_that_goes_nowhere_by_logprobs_alone(world: str) -> None:
    message = engine_world(world)["damaged"]["proof without read-back"]
    assert "off those of an independent forward" in message
    assert "moved the engine's log-probs by 0.00e+00 only" in message


@moe_worlds
def test_vllms_own_reload_without_our_repack_is_caught_at_the_experts(world: str) -> None:
    # When this fails vLLM has been mended, and `_repack_experts` is no longer needed.
    assert named(engine_world(world)["damaged"]["not repacked"]) == {
        f"model.layers.{layer}.mlp.experts.routed_experts.{stack}"
        for layer in range(2)
        for stack in ("w13_weight", "w2_weight")
    }
