"""The plan of a sync against brute force: every layout pair's plans, carried out on numbers.

Ranks, their parameters and the grid's order are written out here by hand, apart from the tables of
the plan; that they are the engines' own is proven by the tests that run the engines.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_precision.config.schema import ModelConfig
from megatron_precision.layouts.regions import Box, Region, not_once, slabs
from megatron_precision.sync.families import RolloutLayout, Shard, TrainerLayout
from megatron_precision.sync.flat_ranges import FlatRange, FlatRanges
from megatron_precision.sync.plan import Cell, PlanError, Planner, RankPlan
from megatron_precision.sync.transfer import misfits
from tests.distributed.layout_oracle import (
    DENSE,
    MODELS,
    THREES,
    RankTensors,
    engine_rank,
    numbered,
    padded,
    trainer_rank,
)

# A busy machine draws slowly; the numbers that are drawn are few.
BUSY = [HealthCheck.too_slow]


@dataclass
class World:
    """Everything of one layout pair."""

    planner: Planner

    def __post_init__(self) -> None:
        planner = self.planner
        model, trainer, rollout = planner.model, planner.trainer, planner.rollout
        self.trainers = {r: trainer_rank(model, trainer, r) for r in trainer.world}
        self.engines = {r: engine_rank(model, rollout, r) for r in rollout.world}
        ranks = sorted({*trainer.world, *rollout.world})
        self.plans = {rank: planner.rank_plan(rank) for rank in ranks}
        self.received: dict[int, int] = dict.fromkeys(ranks, 0)
        self.crossed: dict[int, int] = {}

    def run(self) -> None:
        """Carry the plans out: what one end packs is what the other unpacks, in its own order."""
        for rank, plan in self.plans.items():
            for cell in plan.copies:
                self.write(rank, cell, self.trainers[rank].view(cell, self.trainers[rank].tensors))
        for fan_out in (False, True):
            messages: dict[tuple[int, int], list[tuple[Cell, torch.Tensor]]] = {}
            for rank, plan in self.plans.items():
                exchange = plan.fan_out if fan_out else plan.direct
                held = (self.engines if fan_out else self.trainers).get(rank)
                for peer, cells in exchange.sends.items():
                    assert held is not None
                    packed = [
                        (c, held.view(c, held.tensors).reshape(c.shape).clone()) for c in cells
                    ]
                    messages[rank, peer] = packed
            for rank, plan in self.plans.items():
                exchange = plan.fan_out if fan_out else plan.direct
                for peer, cells in exchange.receives.items():
                    packed = messages.pop((peer, rank))
                    assert [cell for cell, _ in packed] == cells
                    for cell, values in packed:
                        self.write(rank, cell, values)
                        self.received[rank] += cell.numel
                        node = self.planner.node(rank)
                        if self.planner.node(peer) != node:
                            self.crossed[node] = self.crossed.get(node, 0) + cell.numel
            assert not messages, "sent to nobody"

    def write(self, rank: int, cell: Cell, values: torch.Tensor) -> None:
        held = self.engines[rank]
        view = held.view(cell, held.tensors)
        view.copy_(values.reshape(view.shape))
        held.view(cell, held.written).add_(1)

    def check(self) -> None:
        """Every engine parameter is the slice of the model that its table says, written once."""
        source = numbered(self.planner.model)
        for held in self.engines.values():
            for region in held.regions:
                view = held.tensors[region.parameter].view(region.view)[region.spans]
                expected = source[region.hf_name][region.box].reshape(view.shape)
                assert torch.equal(view, expected), region
                count = held.written[region.parameter].view(region.view)[region.spans]
                assert bool((count == 1).all()), region
            for name, count in held.written.items():
                covered = sum(p.numel for p in held.regions if p.parameter == name)
                assert int(count.sum()) == covered, f"{name}: padding was written"
        self.check_bytes()

    def check_bytes(self) -> None:
        """No rank and no node receives more than what it needs and has not."""
        needs = {r: _elements(h.regions, self.planner.model) for r, h in self.engines.items()}
        has = {r: _held(h) for r, h in self.trainers.items()}
        for rank, elements in needs.items():
            assert self.received[rank] == len(elements - has.get(rank, set()))
        nodes = {self.planner.node(rank) for rank in needs}
        for node in nodes:
            inside = [r for r in self.plans if self.planner.node(r) == node]
            wanted = set().union(*(needs.get(r, set()) for r in inside))
            there = set().union(*(has.get(r, set()) for r in inside))
            assert self.crossed.get(node, 0) == len(wanted - there)


def _elements(regions: list[Region], model: ModelConfig) -> set[int]:
    source = numbered(model)
    return {x for p in regions for x in source[p.hf_name][p.box].flatten().tolist()}


def _held(held: RankTensors) -> set[int]:
    """The numbers of a trainer's parameters; -1 is padding, or another rank's main copy."""
    names = {region.parameter for region in held.regions}
    return {x for name in names for x in held.tensors[name].flatten().tolist() if x > 0}


def pairs(
    model: ModelConfig, size: int, disjoint: bool = False
) -> Iterator[tuple[TrainerLayout, RolloutLayout]]:
    """Every pair of layouts that divide the model, over `size` ranks (or two sets of them)."""
    first = size if disjoint else 0
    experts, kv_heads = model.num_experts, model.num_key_value_heads
    inner = model.moe_intermediate_size if experts else model.intermediate_size
    sizes = [n for n in range(1, size + 1) if size % n == 0]
    trainers = [
        TrainerLayout(size, tp, pp, ep, etp)
        for tp, pp, ep in itertools.product(sizes, sizes, sizes if experts else [1])
        for etp in (1, 2, 3) if experts or etp == 1
        if size % (tp * pp) == size % (ep * etp * pp) == 0
        if kv_heads % tp == model.num_hidden_layers % pp == 0
        if not (experts % ep or model.moe_intermediate_size % etp)
    ]  # fmt: skip
    rows = padded(model.vocab_size, 64)
    engines = [
        RolloutLayout(size, tp, whole, first)
        for tp, whole in itertools.product(sizes, (False, True) if experts else (False,))
        if model.num_attention_heads % tp == rows % tp == 0
        if kv_heads % tp == 0 or tp % kv_heads == 0
        if (experts if whole else inner) % tp == 0
    ]
    yield from itertools.product(trainers, engines)


def run_pairs(model: ModelConfig, size: int, ranks_per_node: int, at_most: int = 10**9) -> None:
    """Every pair, or so many of them, drawn by the size."""
    found = list(pairs(model, size))
    if len(found) > at_most:
        found = random.Random(size).sample(found, at_most)
    for trainer, rollout in found:
        world = World(Planner(model, trainer, rollout, ranks_per_node))
        world.run()
        world.check()


def test_pairs_are_as_many_as_by_hand() -> None:
    """Four ranks, four KV heads and layers: TP x PP of 1x1, 1x2, 1x4, 2x1, 2x2 and 4x1; TP 1, 2, 4.

    On six ranks, with six of each and as many experts, as for the trainer the stage has 6, 3, 2 or
    one rank, which TP divides in 4, 2, 2 and 1 ways, and EP x ETP in 4 + 2 + 2, 2 + 1, 2 + 1 and 1.
    """
    assert len(list(pairs(MODELS["dense"], 4))) == 6 * 3
    engines = 4 + 4  # TP 1, 2, 3 or 6, experts divided or whole
    trainers = 4 * (4 + 2 + 2) + 2 * (2 + 1) + 2 * (2 + 1) + 1 * 1
    assert len(list(pairs(THREES["MoE of threes"], 6))) == trainers * engines


@pytest.mark.parametrize(
    ("size", "kind"),
    [
        pytest.param(size, kind, marks=pytest.mark.slow if (size, kind) == (4, "MoE") else ())
        for size in (1, 2, 4)
        for kind in MODELS
    ],
)
def test_every_pair_of_small_layouts(kind: str, size: int) -> None:
    run_pairs(MODELS[kind], size, 2)


@pytest.mark.parametrize("kind", list(THREES))
def test_every_pair_of_layouts_on_three_ranks(kind: str) -> None:
    run_pairs(THREES[kind], 3, 2)


# Hundreds of pairs: all of them are `exhaustive`, what changes are tried with is a sample.
LARGER = [
    *((MODELS[kind], size) for kind in MODELS for size in (8, 16)),
    *((THREES[kind], size) for kind in THREES for size in (5, 6, 7, 9, 10, 11, 12, 13, 14, 15)),
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "size"), LARGER)
def test_many_pairs_of_larger_layouts(model: ModelConfig, size: int) -> None:
    run_pairs(model, size, 4, at_most=24)


@pytest.mark.exhaustive
@pytest.mark.parametrize(("model", "size"), LARGER)
def test_every_pair_of_larger_layouts(model: ModelConfig, size: int) -> None:
    run_pairs(model, size, 4)


@pytest.mark.parametrize("kind", ["dense", "MoE"])
def test_trainers_and_engines_apart(kind: str) -> None:
    for trainer, rollout in pairs(MODELS[kind], 2, disjoint=True):
        world = World(Planner(MODELS[kind], trainer, rollout, ranks_per_node=2))
        world.run()
        world.check()
        assert not any(plan.copies for plan in world.plans.values())


@st.composite
def planners(draw: st.DrawFn) -> Planner:
    """Layouts and sizes that have little in common."""
    # vLLM's vocabulary is a multiple of 64 rows, which its ranks must divide.
    tp, rollout_tp = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 4]))
    pp, ep, etp = (draw(st.sampled_from([1, 2])) for _ in range(3))
    moe = draw(st.booleans())
    if not moe:
        ep = etp = 1
    size = math.lcm(tp * pp, ep * etp * pp, rollout_tp)
    kv_heads = tp * draw(st.integers(1, 3))
    kv_heads = kv_heads if kv_heads % rollout_tp == 0 or rollout_tp % kv_heads == 0 else 12
    heads = kv_heads * draw(st.integers(1, 3))
    heads = heads if heads % rollout_tp == 0 else heads * rollout_tp
    both = math.lcm(tp, rollout_tp)
    whole = draw(st.booleans()) and moe
    model = ModelConfig(
        model_type="qwen3_moe" if moe else draw(st.sampled_from(["qwen3", "qwen2", "llama"])),
        vocab_size=draw(st.integers(3, 150)),
        hidden_size=draw(st.integers(2, 5)),
        intermediate_size=both * draw(st.integers(1, 3)),
        num_hidden_layers=pp * draw(st.integers(1, 2)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=2,
        tie_word_embeddings=draw(st.booleans()),
        num_experts=math.lcm(ep, rollout_tp) * draw(st.integers(1, 2)) if moe else 0,
        num_experts_per_tok=1 if moe else 0,
        moe_intermediate_size=math.lcm(etp, rollout_tp) * draw(st.integers(1, 2)) if moe else 0,
    )
    return Planner(
        model,
        TrainerLayout(size, tp, pp, ep, etp),
        RolloutLayout(size, rollout_tp, whole, first=draw(st.sampled_from([0, size]))),
        ranks_per_node=draw(st.sampled_from([1, 2, 3, 8])),
        cell_elements=draw(st.sampled_from([1, 7, 64, 2**22])),
    )


@st.composite
def main_copies(draw: st.DrawFn) -> tuple[Planner, FlatRanges]:
    """Every parameter of data-parallel replicas, cut anywhere between them; some held whole."""
    planner = draw(planners())
    layout = planner.trainer
    replicated = dataclasses.replace(layout, size=layout.size * draw(st.sampled_from([1, 2, 3])))
    size = math.lcm(replicated.size, planner.rollout.size)
    first = size if planner.rollout.first else 0
    planner = dataclasses.replace(
        planner,
        trainer=dataclasses.replace(layout, size=size),
        rollout=dataclasses.replace(planner.rollout, size=size, first=first),
    )
    replicas: dict[tuple[tuple[str, tuple[int, ...]], ...], list[tuple[int, int]]] = {}
    for rank in planner.trainer.world:
        held = trainer_rank(planner.model, planner.trainer, rank)
        for name in dict.fromkeys(region.parameter for region in held.regions):
            regions = tuple((p.hf_name, p.start) for p in held.regions if p.parameter == name)
            replicas.setdefault(regions, []).append((rank, held.tensors[name].numel()))
    ranges: dict[int, list[FlatRange]] = {}
    for regions, ranks in replicas.items():
        if draw(st.integers(0, 4)) == 0:
            continue  # an FP32 parameter of a 16-bit model: no copy, and whole everywhere
        numel = ranks[0][1]
        edges = sorted(draw(st.integers(0, numel)) for _ in ranks[1:])
        spans = zip([0, *edges], [*edges, numel], strict=True)
        for (rank, _), (begin, end) in zip(ranks, spans, strict=True):
            ranges.setdefault(rank, []).extend(
                FlatRange(name, start, begin, end) for name, start in regions
            )
    return planner, FlatRanges(tuple(tuple(ranges.get(r, ())) for r in range(2 * size)))


@given(main_copies())
@settings(max_examples=15, deadline=None, suppress_health_check=BUSY)
def test_main_copies_in_flat_ranges(made: tuple[Planner, FlatRanges]) -> None:
    """A rank has the numbers of its ranges alone: whatever else is sent from it arrives as -1."""
    planner, ranges = made
    world = World(dataclasses.replace(planner, ranges=ranges))
    for rank, held in world.trainers.items():
        parameters = {(p.hf_name, p.start): p.parameter for p in held.regions}
        for found in ranges.by_rank[rank]:
            flat = held.tensors[parameters[found.hf_name, found.start]].view(-1)
            flat[: found.begin] = -1
            flat[found.end :] = -1
    world.run()
    world.check()


@given(planners())
@settings(max_examples=60, deadline=None, suppress_health_check=BUSY)
def test_layouts_that_have_little_in_common(planner: Planner) -> None:
    world = World(planner)
    world.run()
    world.check()


@pytest.mark.parametrize("kind", [*MODELS, *THREES])
@pytest.mark.parametrize(("replicas", "per_node"), [(2, 1), (2, 2), (3, 1), (4, 2), (4, 4)])
def test_replicas_send_as_many_bytes(kind: str, replicas: int, per_node: int) -> None:
    """Replicas of the trainer, and as many engines elsewhere."""
    model = MODELS[kind] if kind in MODELS else THREES[kind]
    engines = RolloutLayout(replicas, 1, first=4)
    planner = Planner(model, TrainerLayout(replicas), engines, per_node, cell_elements=20)
    sent = [
        sum(cell.numel for cells in plan.direct.sends.values() for cell in cells)
        for plan in (planner.rank_plan(rank) for rank in range(replicas))
    ]
    assert max(sent) < 1.02 * sum(sent) / replicas


def test_a_cell_that_is_larger_than_a_message_is_cut() -> None:
    planner = Planner(DENSE, TrainerLayout(1), RolloutLayout(1), cell_elements=40)
    plan: RankPlan = planner.rank_plan(0)
    assert max(cell.numel for cell in plan.copies) <= 40
    whole = Planner(DENSE, TrainerLayout(1), RolloutLayout(1)).rank_plan(0)
    assert sum(c.numel for c in plan.copies) == sum(c.numel for c in whole.copies)


def test_what_no_layout_covers_is_named_with_both_layouts() -> None:
    # Three KV heads over two ranks: the second half of one is nobody's.
    model = dataclasses.replace(DENSE, num_attention_heads=9, num_key_value_heads=3)
    with pytest.raises(PlanError) as wrong:
        Planner(model, TrainerLayout(2, tp=2), RolloutLayout(2)).rank_plan(0)
    message = str(wrong.value)
    assert "model.layers.{layer}.self_attn.k_proj.weight" in message
    assert "TrainerLayout(size=2, tp=2" in message
    assert "RolloutLayout(size=2" in message


@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.data())
def test_slabs_are_the_rows_in_order_and_each_one_box(
    sizes: list[int], data: st.DataObject
) -> None:
    total = math.prod(sizes)
    begin = data.draw(st.integers(0, total))
    end = data.draw(st.integers(begin, total))
    found = slabs(tuple(sizes), begin, end)
    rows = [row for a, b in found for row in range(a, b)]
    assert rows == list(range(begin, end))
    grid = torch.arange(total).view(sizes)
    for a, b in found:
        places = (grid >= a) & (grid < b)
        where = places.nonzero()
        low, high = where.min(0).values, where.max(0).values + 1
        assert int((high - low).prod()) == b - a


def marked(whole: Box, parts: list[Box]) -> torch.Tensor:
    """How often each element of a box is in a part; the parts lie in it."""
    count = torch.zeros(whole.shape, dtype=torch.int64)
    for part in parts:
        ends = zip(part.start, part.shape, whole.start, strict=True)
        count[tuple(slice(a - first, a - first + n) for a, n, first in ends)] += 1
    return count


@given(st.data())
def test_boxes_that_make_another_one_once_are_told_from_all_others(data: st.DataObject) -> None:
    whole = Box((5, 7), (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))))

    def box() -> Box:
        at = [data.draw(st.integers(0, n - 1)) for n in whole.shape]
        shape = [data.draw(st.integers(1, n - a)) for a, n in zip(at, whole.shape, strict=True)]
        first, second = (a + b for a, b in zip(at, whole.start, strict=True))
        return Box((first, second), (shape[0], shape[1]))

    if data.draw(st.booleans()):
        # A cut in rows and columns, in any order, and perhaps one of the parts lost or twice.
        rows, columns = (sorted({0, data.draw(st.integers(0, n)), n}) for n in whole.shape)
        parts = [
            Box((5 + a, 7 + c), (b - a, d - c))
            for (a, b), (c, d) in itertools.product(
                itertools.pairwise(rows), itertools.pairwise(columns)
            )
        ]
        parts = data.draw(st.permutations(parts))
        parts += data.draw(st.sampled_from([[], [], parts[:1], [box()]]))
        parts = parts[data.draw(st.integers(0, 1)) :]
    else:
        parts = [box() for _ in range(data.draw(st.integers(0, 4)))]
    once = bool((marked(whole, parts) == 1).all())
    assert (not_once(whole, parts) == "") == once


def test_a_plan_that_leaves_out_a_row_is_no_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fault of the cuts themselves: both sides hold everything."""
    boxes = Planner._boxes

    def lossy(self: Planner, source: Shard, target: Shard) -> Iterator[Box]:
        for box in boxes(self, source, target):
            if "o_proj" in source.region.hf_name:
                box = Box(box.start, (box.shape[0] - 1, *box.shape[1:]))
            yield box

    monkeypatch.setattr(Planner, "_boxes", lossy)
    with pytest.raises(PlanError) as wrong:
        Planner(DENSE, TrainerLayout(2, tp=2), RolloutLayout(2, 2)).rank_plan(0)
    message = str(wrong.value)
    assert "the plan covers 80 of 96 elements" in message
    assert "o_proj" in message
    assert "gate_proj" not in message
    assert "TrainerLayout(size=2, tp=2" in message
    assert "RolloutLayout(size=2, tp=2" in message


def test_tensors_of_another_layout_than_planned_are_named() -> None:
    """An engine that holds less, and one that holds more: half of it would stay as it was."""
    planner = Planner(DENSE, TrainerLayout(2), RolloutLayout(2, 2), ranks_per_node=2)
    plan = planner.rank_plan(0)
    source = trainer_rank(DENSE, TrainerLayout(2), 0)
    sources = [(region, source.tensors[region.parameter]) for region in source.regions]

    def found(layout: RolloutLayout) -> list[str]:
        held = engine_rank(DENSE, layout, 0)
        targets = [(region, held.tensors[region.parameter]) for region in held.regions]
        return misfits([plan], sources, targets)

    assert found(RolloutLayout(2, 2)) == []
    divided = 4 * 7 + 2  # q, k, v, o, gate, up and down; embedding and head
    more, less = found(RolloutLayout(2, 1)), found(RolloutLayout(4, 4))
    assert len(more) == divided
    assert any("0.self_attn.o_proj.weight: the plan covers 96 of 192 elements" in m for m in more)
    assert len({line.partition(":")[0] for line in less}) == divided
    assert any("o_proj.weight: the engine has no [6, 16] from [0, 0]" in line for line in less)
    half = [(region, tensor) for region, tensor in sources if "o_proj" not in region.hf_name]
    held = engine_rank(DENSE, RolloutLayout(2, 2), 0)
    targets = [(region, held.tensors[region.parameter]) for region in held.regions]
    assert [line.partition(": ")[2] for line in misfits([plan], half, targets)] == [
        "the trainer has no [6, 16] from [0, 0] on this rank"
    ] * 4
