"""Routing replay and router flips against transformers, in FP32 on two ranks."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest
import torch

from megatron_precision.actor.batch import Batch, MicroBatch, TokenLayout
from megatron_precision.actor.routing import Routing, _LayerRouting
from megatron_precision.config.schema import (
    UNKNOWN_EXPERT,
    MemoryConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from tests.distributed.cases import Case
from tests.distributed.harness import run_distributed
from tests.distributed.oracle import MOE, checkpoint, expected, random_batch, random_hf_model

LAYERS, TOP_K, EXPERTS = MOE.num_hidden_layers, MOE.num_experts_per_tok, MOE.num_experts
FULL = MemoryConfig("full", "fused")
TP_EP = ParallelConfig(2, 2, 1, 2, sequence_parallel=True)
# name: (layout, memory, packed sequences)
LAYOUTS = {
    "EP": (ParallelConfig(2, 1, 1, 2), MemoryConfig(), False),
    "TP and EP": (TP_EP, MemoryConfig(), False),
    # Layers run again in the backward pass, after other micro-batches have begun.
    "PP again": (ParallelConfig(2, 1, 2, rollout_tp_size=1), FULL, False),
    "TP and EP, packed": (TP_EP, FULL, True),
}
FREE = ["EP", "TP and EP", "TP and EP, packed"]


class ForcedGate:
    """In the place of a gate's forward pass: the experts it is told, or its own where unknown."""

    def __init__(self, gate: Any, told: list[torch.Tensor] | None) -> None:
        self.gate, self.told = gate, told
        self.chosen: list[torch.Tensor] = []
        self.calls = 0

    def __call__(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        logits = torch.nn.functional.linear(hidden, self.gate.weight)
        chosen = logits.topk(TOP_K).indices
        if self.told is not None:
            told = self.told[self.calls].long()
            chosen = torch.where(told == UNKNOWN_EXPERT, chosen, told)
        self.calls += 1
        self.chosen.append(chosen.detach())
        return logits, logits.gather(1, chosen).softmax(-1), chosen


def oracle(batch: Batch, told: list[torch.Tensor] | None) -> tuple[Any, Any, list[torch.Tensor]]:
    """(model, what the trainer must reproduce, the experts used [length, layers, k])."""
    built = random_hf_model(MOE)
    gates = []
    for number, layer in enumerate(built.model.layers):  # type: ignore[union-attr, arg-type]
        part = None if told is None else [experts[:, number] for experts in told]
        gates.append(ForcedGate(layer.mlp.gate, part))
        layer.mlp.gate.forward = gates[-1]
    wanted = expected(MOE, built, batch)
    used = [torch.stack(layers, 1) for layers in zip(*(g.chosen for g in gates), strict=True)]
    return built, wanted, used


@functools.cache
def batch() -> Batch:
    return random_batch(MOE, 8)


@functools.cache
def told() -> list[torch.Tensor]:
    """Random sets of experts; those of each last token and of every fifth are not known."""
    generator = torch.Generator().manual_seed(5)
    found = []
    for length in batch().lengths.tolist():
        scores = torch.rand(length, LAYERS, EXPERTS, generator=generator)
        experts = scores.topk(TOP_K).indices.to(torch.uint8)
        experts[-1] = experts[::5] = UNKNOWN_EXPERT
        found.append(experts)
    return found


@functools.cache
def replayed() -> tuple[Any, Any, list[torch.Tensor]]:
    return oracle(batch(), told())


@functools.cache
def free() -> tuple[Any, Any, list[torch.Tensor]]:
    return oracle(batch(), None)


def altered() -> list[torch.Tensor]:
    """transformers' own choices, but for another expert at the second token of layer 1."""
    found = [experts.clone() for experts in free()[2]]
    for experts in found:
        others = [e for e in range(EXPERTS) if e not in experts[1, 1]]
        experts[1, 1, 0] = others[0]
        experts[:] = experts.flip(-1)  # the order within a set is no difference
    return found


def case(layout: str, experts: list[torch.Tensor], replay: bool) -> Case:
    parallel, memory, packed = LAYOUTS[layout]
    config = RunConfig(
        "test",
        precision="fp32",
        model=MOE,
        parallel=parallel,
        rollout=RolloutConfig(temperature=1.0),
        train=TrainConfig(micro_batch_size=2, packed_sequences=packed, routing_replay=replay),
        memory=memory,
    )
    arrays = [part.to(torch.uint8).numpy() for part in experts]
    built = free()[0]
    return Case(config, checkpoint(MOE, built), dataclasses.replace(batch(), routed_experts=arrays))


@functools.cache
def world() -> dict[str, dict[str, Any]]:
    cases = {f"{layout} replayed": case(layout, told(), True) for layout in LAYOUTS}
    cases |= {f"{layout} free": case(layout, altered(), False) for layout in FREE}
    found: dict[str, dict[str, Any]] = run_distributed("routing_bodies.passes", 2, cases)
    return found


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_replayed_experts_give_the_log_probs_and_gradients_of_forced_ones(layout: str) -> None:
    found, (_, wanted, _) = world()[f"{layout} replayed"], replayed()
    mask = batch().response_mask
    torch.testing.assert_close(found["logprobs"][mask], wanted.logprobs[mask], atol=2e-4, rtol=1e-3)
    assert (free()[1].logprobs - wanted.logprobs)[mask].abs().mean() > 0.1  # forcing matters
    for name, gradient in wanted.gradients.items():
        torch.testing.assert_close(found["gradients"][name], gradient, atol=2e-3, rtol=2e-3)
    gates = [n for n in wanted.gradients if n.endswith("mlp.gate.weight")]
    assert len(gates) == LAYERS
    assert all(wanted.gradients[n].abs().max() > 0.01 for n in gates)


@pytest.mark.parametrize("layout", FREE)
def test_flips_are_those_that_were_made(layout: str) -> None:
    flips = world()[f"{layout} free"]["flips"]
    tokens = int(batch().lengths.sum())
    assert flips.tokens == tokens
    assert flips.by_layer == pytest.approx([0.0, len(batch()) / tokens])
    assert flips.flip_share == pytest.approx(len(batch()) / tokens / 2)
    # One of two experts of one token in two layers' worth of each sequence.
    assert flips.overlap == pytest.approx(1 - len(batch()) / tokens / 4)
    # One layer of the second token of every sequence, on whichever rank it was.
    where = torch.zeros_like(batch().tokens)
    where[:, 1] = 1
    assert torch.equal(world()[f"{layout} free"]["flipped"].long(), where)
    mask = batch().response_mask
    torch.testing.assert_close(
        world()[f"{layout} free"]["logprobs"][mask], free()[1].logprobs[mask], atol=2e-4, rtol=1e-3
    )


def test_replaying_a_router_s_own_choice_changes_no_bit_in_any_order() -> None:
    generator = torch.Generator().manual_seed(3)
    scores = torch.randn(50, 9, generator=generator)
    values, own = scores.topk(4)
    routing = Routing(torch.nn.Module(), num_layers=1, replay=True, recompute=False, shard=(0, 1))
    shuffled = own[:, torch.tensor([2, 0, 3, 1])].to(torch.uint8)
    one = MicroBatch(torch.tensor([0]), 50)
    layout = TokenLayout.of(one, torch.tensor([50]))
    routing.micro_batch(shuffled.reshape(1, 50, 1, 4), layout, one.rows)
    taken, chosen = _LayerRouting(routing, 0).get_replay_topk(
        scores, 4, default_compute_topk=lambda s, k, **_: torch.topk(s, k, dim=1)
    )
    assert torch.equal(taken, values)
    assert torch.equal(chosen, own)


def test_a_dense_batch_and_one_without_choices_carry_none() -> None:
    assert batch().select(torch.arange(2), 9).routed_experts is None
    some = dataclasses.replace(batch(), routed_experts=[np.ones((3, 2, 2), np.uint8)] * 8)
    part = some.select(torch.tensor([1]), 5).routed_experts
    assert isinstance(part, torch.Tensor)
    assert part.shape == (1, 5, 2, 2)
    assert (part[0, 3:] == UNKNOWN_EXPERT).all()
    assert (part[0, :3] == 1).all()
