"""Bytes of a weight sync between a run's two layouts, for jobs of any size in milliseconds.

A plan (`weights/plan.py`) brings a rank what its engine needs and its trainer has not, once, and a
node what its ranks need and none of them has, once. So what is received follows from the boxes of
both sides alone; tests compare it with plans that are counted message by message
(`weights/traffic.py`, and `sync-bench` for who sends). All layers of a stage and all experts of a
rank are divided alike: each family is looked at once for a rank's place, and not once a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from megatron_precision.config.schema import RunConfig
from megatron_precision.layouts.regions import overlap
from megatron_precision.precision.policy import BYTES_PER_ELEMENT
from megatron_precision.sync.families import (
    Family,
    RolloutLayout,
    Shard,
    Shards,
    TrainerLayout,
    families,
)


@dataclass(frozen=True)
class SyncBytes:
    """What one sync moves, in bytes on the wire.

    Attributes:
        weights: all weights of the model once.
        copied: inside a rank, all ranks together.
        received: in messages, all ranks together.
        network: of these, over the network; a byte that several ranks of a node need, once.
        rank_received: by the rank that receives most.
        node_network: entering the node that most enters.
        exact: whether a plan moves exactly this; of main copies, this is the most that it could.
    """

    weights: int
    copied: int
    received: int
    network: int
    rank_received: int
    node_network: int
    exact: bool


def of_run(config: RunConfig, ranks_per_node: int) -> SyncBytes:
    """The bytes of a sync of a valid configuration."""
    layout, model = config.parallel, config.model
    trainer = TrainerLayout(
        layout.world_size, layout.tp_size, layout.pp_size, layout.ep_size, layout.etp_size
    )
    sides = _Sides(config, trainer, RolloutLayout(layout.world_size, layout.rollout_tp_size))
    itemsize = BYTES_PER_ELEMENT[config.policy.wire]
    world = range(layout.world_size)
    ranks = [sides.balance([rank]) for rank in world]
    nodes = [
        sides.balance(range(first, min(first + ranks_per_node, layout.world_size)))
        for first in range(0, layout.world_size, ranks_per_node)
    ]
    missing = [balance.missing * itemsize for balance in ranks]
    entering = [balance.missing * itemsize for balance in nodes]
    weights = sum(math.prod(f.shape) * _count(f, config) for f in families(model))
    return SyncBytes(
        weights=weights * itemsize,
        copied=sum(balance.there for balance in ranks) * itemsize,
        received=sum(missing),
        network=sum(entering),
        rank_received=max(missing),
        node_network=max(entering),
        exact=config.policy.wire_source == "parameters",
    )


@dataclass(frozen=True)
class _Balance:
    """Elements that some ranks' engines need: those that their trainers have, and the others."""

    there: int
    missing: int


# Where a rank stands: (position in its engine, TP, expert TP, expert parallel, stage).
_Place = tuple[int, int, int, int, int]


class _Sides:
    """Both layouts of a run."""

    def __init__(self, config: RunConfig, trainer: TrainerLayout, rollout: RolloutLayout) -> None:
        self._config, self._trainer, self._rollout = config, trainer, rollout
        self._families = families(config.model)
        self._have: Shards = trainer.shards(config.model)
        self._need: Shards = rollout.shards(config.model)
        self._balances: dict[tuple[_Place, ...], _Balance] = {}
        self._overlaps: dict[tuple[str, frozenset[int], frozenset[int]], int] = {}

    def balance(self, ranks: Iterable[int]) -> _Balance:
        """Of the ranks together; those of equal places are worked out once."""
        places = tuple(sorted({self._place(rank) for rank in ranks}))
        if places not in self._balances:
            self._balances[places] = self._of_places(places)
        return self._balances[places]

    def _place(self, rank: int) -> _Place:
        t = self._trainer
        stage, within = divmod(rank, t.size // t.pp)
        return rank % self._rollout.tp, within % t.tp, within % t.etp, within // t.etp % t.ep, stage

    def _of_places(self, places: tuple[_Place, ...]) -> _Balance:
        positions = frozenset(place[0] for place in places)
        needed = there = 0
        for family in self._families:
            boxes = [s for s in self._need[family.template] if positions.intersection(s.positions)]
            needed += _count(family, self._config) * sum(_size(shard) for shard in boxes)
            if self._config.policy.wire_source == "main_copies":
                continue  # which range of a main copy a rank has is Megatron's to say
            for count, holders in self._holders(family, places):
                there += count * self._shared(family.template, positions, holders)
        return _Balance(there, needed - there)

    def _holders(
        self, family: Family, places: tuple[_Place, ...]
    ) -> Iterator[tuple[int, frozenset[int]]]:
        """(tensors of the family that are held alike, positions of the places that hold them)."""
        t, model = self._trainer, self._config.model
        layers = model.num_hidden_layers // t.pp
        groups: dict[tuple[int, int], set[int]] = {}
        if "{expert}" in family.template:
            for _, _, etp, ep, stage in places:
                groups.setdefault((stage, ep), set()).add(etp)
            count = layers * (model.num_experts // t.ep)
        else:
            only = None
            if "{layer}" not in family.template:
                only = 0 if family.template == "model.embed_tokens.weight" else t.pp - 1
            for _, tp, _, _, stage in places:
                if only in (None, stage):
                    groups.setdefault((stage, 0), set()).add(tp)
            count = layers if only is None else 1
        for holders in groups.values():
            yield count, frozenset(holders)

    def _shared(self, template: str, needers: frozenset[int], holders: frozenset[int]) -> int:
        """Elements of one tensor in boxes of both sides' positions."""
        key = (template, needers, holders)
        if key not in self._overlaps:
            self._overlaps[key] = self._shared_boxes(template, needers, holders)
        return self._overlaps[key]

    def _shared_boxes(self, template: str, needers: frozenset[int], holders: frozenset[int]) -> int:
        found = 0
        for target in self._need[template]:
            for source in self._have[template]:
                if needers.isdisjoint(target.positions) or holders.isdisjoint(source.positions):
                    continue
                box = overlap(source.box, target.box)
                found += math.prod(box.shape) if box else 0
        return found


def _size(shard: Shard) -> int:
    return math.prod(shard.box.shape)


def _count(family: Family, config: RunConfig) -> int:
    """Tensors of a family."""
    layers = config.model.num_hidden_layers if "{layer}" in family.template else 1
    return layers * (config.model.num_experts if "{expert}" in family.template else 1)
