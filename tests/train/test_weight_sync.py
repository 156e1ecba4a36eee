"""Trainer to engine, with the real engines on two ranks: every way to lose a weight is caught.

Dense models train with TP 2 and roll out with TP 2; MoE models train with EP 2 and roll out with
TP 2. Not covered: replicas of the engine, pipeline stages (see the end-to-end tests).
"""

from __future__ import annotations

import re

import pytest
import torch

from megatron_precision.layouts.hf_files import build_hf_model
from tests.distributed.engine_worlds import (
    LAYOUTS,
    engine_world,
    every_world,
    flips_world,
    fresh_world,
    main_copies_world,
)
from tests.distributed.oracle import logprobs_of

# Median absolute difference between the engine and an FP32 forward of the same weights. The mean
# is no measure of an MoE model: where two experts are close, rounding chooses another one.
CLOSE = {"fp16": 3e-3, "bf16": 3e-2}
NAMES = {name: model for name, (model, _) in LAYOUTS.items()}
moe_worlds = pytest.mark.parametrize(
    "world", ["MoE bf16", pytest.param("MoE fp16", marks=pytest.mark.slow)]
)


def parameters_of(message: str) -> set[str]:
    """The engine's parameters that an error lists, on whichever rank."""
    return set(re.findall(r"rank \d: (\S+): \[", message))


def tensors_of(message: str) -> set[str]:
    """The Hugging Face tensors that an error lists."""
    return set(re.findall(r" of (\S+) from \[", message))


def on_rank_0(message: str) -> set[str]:
    """Its tensors there: each rank breaks a region of its own, which may be of another tensor."""
    return tensors_of("\n".join(line for line in message.splitlines() if "rank 0" in line))


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
def test_after_a_push_the_engine_computes_what_one_that_loaded_the_checkpoint_does(
    world: str,
) -> None:
    push = engine_world(world)["push"]
    # What the converter exports of what Megatron saves, bit for bit the weights that were pushed.
    assert push["exported"].keys() == push["tensors"].keys()
    assert [n for n, t in push["exported"].items() if not torch.equal(t, push["tensors"][n])] == []
    assert fresh_world(world) == push["scores"]


@every_world
def test_it_is_a_backend_of_vllms_weight_transfer(world: str) -> None:
    assert engine_world(world)["backend"] == ("megatron_precision", "PlannedWeightTransfer")


@every_world
def test_tensors_that_moved_are_found_again_without_another_plan(world: str) -> None:
    moved = engine_world(world)["moved"]
    assert moved["after"] == moved["before"]
    assert moved["other weights"] != moved["before"]
    assert moved["plans"] == 0


@every_world
def test_every_region_of_the_engine_is_compared(world: str) -> None:
    # By hand, on rank 0. A dense layer has q, k, v, o, gate, up, down and four norms; an MoE layer
    # its router and 3 x 4 experts' tensors instead of three. Outside of layers: the last norm, and
    # the embedding and the head, of which trainers with TP 2 hold other rows than the engine.
    by_hand = {"dense": 2 * 11 + 1 + 2 * 2, "MoE": 2 * 21 + 1 + 2}
    assert engine_world(world)["push"]["regions"] == by_hand[world.split()[0]]


@every_world
def test_one_flipped_bit_of_any_live_kernel_tensor_is_noticed(world: str) -> None:
    damaged = engine_world(world)["damaged"]
    flipped = damaged["flipped"]
    assert {n: parameters_of(message) for n, message in flipped.items()} == {
        n: {n} for n in damaged["parameters"]
    }
    # And on the way into a kernel that keeps a copy of its own.
    staging = damaged["staging"]
    assert {n: parameters_of(message) for n, message in staging.items()} == {
        n: {n} for n in damaged["staged"]
    }


@pytest.mark.slow
@pytest.mark.parametrize("world", ["dense fp32", "MoE fp32"])
def test_one_flipped_bit_is_noticed_in_fp32(world: str) -> None:
    found = flips_world(world)
    named = {n: parameters_of(message) for n, message in found["flipped"].items()}
    assert named == {n: {n} for n in found["parameters"]}


@every_world
@pytest.mark.parametrize("way", ["copies", "messages"])
@pytest.mark.parametrize("kind", ["dropped", "misdirected", "duplicated"])
def test_a_region_on_the_wrong_way_is_caught_and_named(world: str, kind: str, way: str) -> None:
    tensors, message = engine_world(world)["damaged"][way][kind]
    assert len(set(tensors)) == (2 if kind == "misdirected" else 1)
    assert tensors_of(message) >= set(tensors)
    assert on_rank_0(message) == set(tensors)


@every_world
def test_a_corrupted_message_is_caught_and_its_tensor_named(world: str) -> None:
    tensors, message = engine_world(world)["damaged"]["message"]
    assert len(tensors) == 1
    assert on_rank_0(message) == set(tensors)


@every_world
def test_an_intact_push_after_damaged_ones_is_accepted(world: str) -> None:
    assert engine_world(world)["damaged"]["intact again"] == ""
    assert engine_world(world)["dtypes again"] == engine_world(world)["dtypes"]


@every_world
def test_a_push_that_goes_nowhere_is_caught(world: str) -> None:
    damaged = engine_world(world)["damaged"]
    assert parameters_of(damaged["lost"]) == set(damaged["parameters"])
    assert parameters_of(damaged["proof"]) == set(damaged["parameters"])


@every_world
def test_the_proof_catches_a_push_that_goes_nowhere_by_logprobs_alone(world: str) -> None:
    message = engine_world(world)["damaged"]["proof without read-back"]
    assert "off the trainer's" in message
    assert "moved the engine's log-probs by 0.00e+00 only" in message


@moe_worlds
def test_vllms_own_reload_without_our_repack_is_caught_at_the_experts(world: str) -> None:
    # When this fails vLLM has been mended, and experts need not be packed here.
    assert parameters_of(engine_world(world)["damaged"]["not repacked"]) == {
        f"model.layers.{layer}.mlp.experts.routed_experts.{stack}"
        for layer in range(2)
        for stack in ("w13_weight", "w2_weight")
    }


def test_main_copies_are_rounded_once_for_the_engine() -> None:
    """The distributed optimizer's halves of each parameter, cast from FP32 to the engine's FP16."""
    found = main_copies_world()
    once = {name: main.half() for name, main in found["main"].items()}
    twice = {name: values.half() for name, values in found["parameters"].items()}
    assert found["engine"].keys() == once.keys()
    assert [n for n, values in found["engine"].items() if not torch.equal(values, once[n])] == []
    # Main copies have digits that the parameters lost: the test could fail.
    assert sum(int((once[name] != twice[name]).sum()) for name in once) > 1000
    # One of two replicas holds each element: half of them come from the other rank.
    numel = sum(tensor.numel() for tensor in once.values())
    assert found["bytes"] == 2 * numel
    assert found["received"] / found["bytes"] == pytest.approx(0.5, abs=0.05)
    assert "differs" in found["damaged"]


def test_prefix_caches_are_forgotten_at_each_push() -> None:
    found = main_copies_world()["prefixes"]
    assert found["pushed"] == found["pushed, no cache"]
    assert found["pushed"] != found["before"]
    # With the caches of the weights before, another number comes out: the test could fail.
    assert found["caches kept"] != found["caches kept, no cache"]
