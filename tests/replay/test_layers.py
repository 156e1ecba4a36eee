"""Errors by layer against transformers' own activations, in FP32, and what 16 bits add.

The subject holds perturbed weights, so that the errors are large and the same in any
implementation. Not covered: layouts of more than two ranks.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megatron_precision.actor.batch import Batch
from megatron_precision.config.schema import ModelConfig, ParallelConfig, RunConfig, TrainConfig
from megatron_precision.replay.findings import PointError, parts_first
from tests.distributed.cases import Case
from tests.distributed.harness import run_distributed
from tests.distributed.oracle import DENSE, MOE, checkpoint, random_batch, random_hf_model

DENSE_3 = dataclasses.replace(DENSE, num_hidden_layers=3, num_key_value_heads=2)
DENSE_4 = dataclasses.replace(DENSE, num_hidden_layers=4)
ONE, TP2_SP = ParallelConfig(1, 1, rollout_tp_size=1), ParallelConfig(2, 2, sequence_parallel=True)
PP2, DP2 = ParallelConfig(2, 1, 2), ParallelConfig(2, 1)
EP2, TP2_EP2_SP = ParallelConfig(2, 1, 1, 2), ParallelConfig(2, 2, 1, 2, sequence_parallel=True)

# name: (model, layout, layer whose weights are perturbed)
Perturbed = tuple[ModelConfig, ParallelConfig, int]
ONE_RANK: dict[str, Perturbed] = {"dense": (DENSE_3, ONE, 1), "MoE": (MOE, ONE, 0)}
TWO_RANKS: dict[str, Perturbed] = {
    "dense TP2 SP": (DENSE_3, TP2_SP, 2),
    "dense PP2": (DENSE_4, PP2, 2),
    "dense DP2": (DENSE_3, DP2, 0),
    "MoE EP2": (MOE, EP2, 1),
    "MoE TP2 SP, end to end": (MOE, TP2_EP2_SP, 0),
}
ROUNDED = {"dense BF16": (DENSE_3, ONE, "bf16"), "dense FP16": (DENSE_3, ONE, "fp16")}


def perturbed(tensors: dict[str, torch.Tensor], layer: int) -> dict[str, torch.Tensor]:
    """The same weights but for one layer's output projection of attention."""
    name = f"model.layers.{layer}.self_attn.o_proj.weight"
    noise = torch.randn(tensors[name].shape, generator=torch.Generator().manual_seed(3))
    return {**tensors, name: tensors[name] + 0.05 * noise}


def case_of(model: ModelConfig, layout: ParallelConfig, packed: bool = False) -> Case:
    config = RunConfig(
        recipe="test", precision="fp32", model=model, parallel=layout,
        train=TrainConfig(micro_batch_size=2, packed_sequences=packed),
    )  # fmt: skip
    batch = random_batch(model, 8)
    return Case(config, checkpoint(model, random_hf_model(model)), batch)


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    one: dict[str, Any] = {}
    two: dict[str, Any] = {}
    for cases, into in ((ONE_RANK, one), (TWO_RANKS, two)):
        for name, (model, layout, layer) in cases.items():
            case = case_of(model, layout, "end to end" in name)
            into[name] = (case, perturbed(case.tensors, layer), "fp32")
    for name, (model, layout, precision) in ROUNDED.items():
        case = case_of(model, layout)
        one[name] = (case, case.tensors, precision)
    results: dict[str, Any] = run_distributed("replay_bodies.compared", 1, one)
    return results | run_distributed("replay_bodies.compared", 2, two)


def activations(model: ModelConfig, layer: int | None, batch: Batch) -> dict[str, torch.Tensor]:
    """[tokens, hidden] after each point of transformers' model, unpadded sequences in turn."""
    built = random_hf_model(model)
    if layer is not None:
        projection = built.model.layers[layer].self_attn.o_proj.weight
        name = f"model.layers.{layer}.self_attn.o_proj.weight"
        projection.data.copy_(perturbed({name: projection.data}, layer)[name])
    kept: dict[str, list[torch.Tensor]] = {}

    def keep(name: str) -> Any:
        def hook(_module: torch.nn.Module, _inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            kept.setdefault(name, []).append(hidden.detach().reshape(-1, hidden.shape[-1]))

        return hook

    for number, module in enumerate(built.model.layers):
        module.register_forward_hook(keep(f"layer {number}"))
    built.model.norm.register_forward_hook(keep("final norm"))
    for tokens, length in zip(batch.tokens, batch.lengths.tolist(), strict=True):
        logits = built(tokens[None, :length]).logits[0].detach()
        mask = torch.zeros(length, dtype=torch.bool)
        row = len(kept.setdefault("LM head", []))
        mask[:-1] = batch.response_mask[row, 1:length]
        kept["LM head"].append(logits[mask])
    return {name: torch.cat(parts) for name, parts in kept.items()}


def by_name(points: list[PointError]) -> dict[str, PointError]:
    return {point.name: point for point in points}


@pytest.mark.parametrize("name", [*ONE_RANK, *TWO_RANKS])
def test_carried_errors_are_those_of_transformers(found: dict[str, Any], name: str) -> None:
    model, layout, layer = (ONE_RANK | TWO_RANKS)[name]
    batch = case_of(model, layout).batch
    exact, ours = activations(model, None, batch), activations(model, layer, batch)
    points = by_name(found[name].free)
    assert list(points) == [
        "embedding", *(f"layer {n}" for n in range(model.num_hidden_layers)), "final norm",
        "LM head",
    ]  # fmt: skip
    for point, values in exact.items():
        error = (ours[point] - values).norm(dim=-1) / values.norm(dim=-1)
        assert points[point].mean == pytest.approx(float(error.mean()), rel=1e-3, abs=2e-6)
        assert points[point].largest == pytest.approx(float(error.max()), rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", [*ONE_RANK, *TWO_RANKS])
def test_the_layer_that_was_perturbed_is_the_one_that_is_named(
    found: dict[str, Any], name: str
) -> None:
    layer = (ONE_RANK | TWO_RANKS)[name][2]
    named = parts_first(found[name].forced)
    assert named is not None
    assert named.name == f"layer {layer}"
    assert named.mean > 0.01
    # With the reference's input every other layer computes what the reference does.
    others = [point for point in found[name].forced if point is not named]
    assert max(point.mean for point in others) < 1e-6


def test_a_perturbed_layer_turns_routers_after_it_and_none_before(found: dict[str, Any]) -> None:
    free, forced = (by_name(points) for points in (found["MoE"].free, found["MoE"].forced))
    # Layer 0's attention is perturbed, which its own router sees.
    assert free["layer 0"].router_mean > 0.001
    assert free["layer 1"].router_mean > 0.001
    # Given the reference's input, layer 1 routes as the reference does.
    assert forced["layer 1"].router_mean < 1e-5
    assert forced["layer 1"].flipped_share == 0
    before = by_name(found["MoE EP2"].free)["layer 0"]
    assert before.router_mean < 1e-5
    assert before.flipped_share == 0


def test_bf16_loses_eight_times_what_fp16_does(found: dict[str, Any]) -> None:
    bf16, fp16 = (by_name(found[f"dense {p}"].forced) for p in ("BF16", "FP16"))
    for layer in ("layer 0", "layer 1", "layer 2", "LM head"):
        # 8 and 11 bits of significand; the weights round alike.
        assert 5 < bf16[layer].mean / fp16[layer].mean < 12
    assert bf16["embedding"].mean > 0  # the FP32 weights of this test are not BF16's


def test_log_probs_of_both_sides_come_back_whole(found: dict[str, Any]) -> None:
    mask = case_of(DENSE_3, DP2).batch.response_mask.numpy()
    for name in ("dense", "dense DP2", "dense TP2 SP"):
        scored = found[name]
        assert (scored.replay[mask] < 0).all()
        assert (scored.fp32[mask] < 0).all()
        assert (scored.replay[mask] != scored.fp32[mask]).all()
        assert not scored.replay[~mask].any()
