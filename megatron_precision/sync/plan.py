"""Plans a weight sync: each rank receives each byte once, from the nearest rank that has it.

The plan is a pure function of both layouts. Each rank computes its own part alone, and the parts
fit, because who sends a cell to whom depends only on the layouts and the cell's turn.

Cells
    A tensor is cut where either side cuts it, and where a cut leaves a box that is no box in a
    parameter's view. So a cell lies whole in one shard of each side, as one strided view.

Routes, for a rank that needs a cell
    1. it has the cell itself, as a trainer: a local copy;
    2. a trainer of its node has it: from there, in turn over those of the node;
    3. otherwise the cell crosses the network to *one* of the node's ranks that need it, from the
       replicas in turn, and fans out from there inside the node.
So a byte that several ranks of a node need crosses the network once, and no rank receives a byte
that it does not need, or receives one twice. Cells of one size follow each other in turns, so that
replicas send as many bytes, but for what is left over where their number does not divide.

`batches` packs cells into messages, in the same way for sender, receiver and the predicted traffic.
The module needs neither torch nor an engine.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from megatron_precision.config.schema import ModelConfig
from megatron_precision.layouts.regions import Box, Region, not_once, overlap, round_up, slabs
from megatron_precision.sync.families import (
    Family,
    Group,
    RolloutLayout,
    Shard,
    TrainerLayout,
    families,
)
from megatron_precision.sync.flat_ranges import FlatRanges

# A cell of more elements is cut further, so that messages fit into bounded buffers.
CELL_ELEMENTS = 2**24
# Layers are brought up to date together as long as an engine's rank holds no more elements of them:
# what is staged for a kernel with a layout of its own is no larger than this, or than one layer of
# each pipeline stage.
GROUP_ELEMENTS = 2**27
Ranks = tuple[int, ...]
_LAYER = re.compile(r"layers\.(\d+)\.")


def cell_elements_of(batch_bytes: int) -> int:
    """Return the largest number of elements of a cell, so that it fits a message in any dtype."""
    return min(CELL_ELEMENTS, batch_bytes // 4)


class PlanError(ValueError):
    """No plan leads from one layout to the other, or a plan does not fit the tensors."""


@dataclass(frozen=True)
class Cell:
    """A box of one Hugging Face tensor that travels as a whole."""

    hf_name: str
    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass
class Exchange:
    """Messages of one round: peer → cells, in one order on both ends."""

    sends: dict[int, list[Cell]] = field(default_factory=dict)
    receives: dict[int, list[Cell]] = field(default_factory=dict)


@dataclass
class RankPlan:
    """One rank's part.

    Attributes:
        copies: cells that the rank has and needs.
        direct: from trainers, over the network and inside the node.
        fan_out: inside the node, after `direct`, of what has come over the network: the sender
            reads where it has just written.
    """

    rank: int
    copies: list[Cell] = field(default_factory=list)
    direct: Exchange = field(default_factory=Exchange)
    fan_out: Exchange = field(default_factory=Exchange)

    @property
    def needed(self) -> list[Cell]:
        """List the cells that arrive in this rank's engine."""
        return [
            *self.copies,
            *(cell for cells in self.direct.receives.values() for cell in cells),
            *(cell for cells in self.fan_out.receives.values() for cell in cells),
        ]

    @property
    def held(self) -> list[Cell]:
        """List the cells that are read from this rank's trainer, each once."""
        sent = (cell for cells in self.direct.sends.values() for cell in cells)
        return list(dict.fromkeys((*self.copies, *sent)))

    def split(self, count: int, group: Callable[[str], int]) -> list[RankPlan]:
        """Split the plan by groups of tensors."""
        parts = [RankPlan(self.rank) for _ in range(count)]
        for cell in self.copies:
            parts[group(cell.hf_name)].copies.append(cell)
        for name in ("direct", "fan_out"):
            whole: Exchange = getattr(self, name)
            for way in ("sends", "receives"):
                for peer, cells in getattr(whole, way).items():
                    for cell in cells:
                        part = getattr(getattr(parts[group(cell.hf_name)], name), way)
                        part.setdefault(peer, []).append(cell)
        return parts


@dataclass(frozen=True)
class _FamilyCell:
    """A cell of a family, and the shard of each side that it lies in.

    Attributes:
        first_turn: of the family's first tensor.
        turns: from one tensor to the next: the cells that a source sends to a target, of each
            tensor in order, have turns without gaps.
    """

    box: Box
    source: Shard
    target: Shard
    first_turn: int
    turns: int


@dataclass(frozen=True)
class Planner:
    """Both layouts, and the nodes.

    Attributes:
        ranks_per_node: of the world; consecutive ranks share a node.
        cell_elements: the most that a cell holds.
        ranges: of the trainer's main copies, where these are sent and not its parameters.
    """

    model: ModelConfig
    trainer: TrainerLayout
    rollout: RolloutLayout
    ranks_per_node: int = 8
    cell_elements: int = CELL_ELEMENTS
    ranges: FlatRanges | None = None

    def node(self, rank: int) -> int:
        """Return the node of a rank."""
        return rank // self.ranks_per_node

    @functools.cached_property
    def _layers_together(self) -> int:
        one = (f for f in families(self.model) if "{layer}" in f.template)
        experts = max(1, self.model.num_experts)
        elements = sum(
            math.prod(f.shape) * (experts if "{expert}" in f.template else 1) for f in one
        )
        return max(1, GROUP_ELEMENTS * self.rollout.tp // (elements * self.trainer.pp))

    @property
    def _layers_a_stage(self) -> int:
        return self.model.num_hidden_layers // self.trainer.pp

    @property
    def group_count(self) -> int:
        """The number of groups of tensors, which are updated one after the other."""
        return 1 + -(-self._layers_a_stage // self._layers_together)

    def group(self, name: str) -> int:
        """Return a tensor's group, by either side's name; tensors without a layer come first.

        Layers of every pipeline stage go together, so that no stage waits while another sends.
        """
        match = _LAYER.search(name)
        if match is None:
            return 0
        return 1 + int(match[1]) % self._layers_a_stage // self._layers_together

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of both layouts: plans with equal hashes are equal."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:16]

    @functools.cached_property
    def cells(self) -> list[tuple[Family, list[_FamilyCell]]]:
        """Return the cells of every family.

        Raises:
            PlanError: names what either side does not cover, or covers twice, and both layouts.
        """
        have, need = self.trainer.shards(self.model), self.rollout.shards(self.model)
        found, problems, turn = [], [], 0
        for family in families(self.model):
            sources, targets = have.get(family.template, []), need.get(family.template, [])
            whole = Box((0,) * len(family.shape), family.shape)
            for side, shards in (("trainer", sources), ("engine", targets)):
                if wrong := not_once(whole, [shard.box for shard in shards]):
                    problems.append(f"the {side} holds {wrong} of {family.template}")
            cells = []
            for source, target in itertools.product(sources, targets):
                boxes = list(self._boxes(source, target))
                ends = [(box, source, target, turn + n) for n, box in enumerate(boxes)]
                cells += [_FamilyCell(*end, len(boxes)) for end in ends]
                turn += len(boxes) * family.count(self.model)
            for target in targets:
                made = [cell.box for cell in cells if cell.target is target]
                if wrong := not_once(target.box, made):
                    problems.append(
                        f"the plan covers {wrong} of {family.template} where an engine has "
                        f"{target.box.shape} of it from {target.box.start}"
                    )
            found.append((family, cells))
        if problems:
            raise PlanError("no plan:\n  " + "\n  ".join(problems) + f"\nfor\n{self.layouts}")
        return found

    @property
    def layouts(self) -> str:
        """Describe both layouts, for messages."""
        return f"  {self.trainer}\n  {self.rollout}"

    def _boxes(self, source: Shard, target: Shard) -> Iterator[Box]:
        """Cut the overlap of two shards into cells of about one size."""
        shared = overlap(source.box, target.box)
        if shared is None:
            return
        begin, rows = shared.start[0], shared.shape[0]
        most = max(1, self.cell_elements // math.prod(shared.shape[1:]))
        step = -(-rows // -(-rows // most))
        unit = max(n for n in _units(source.region, target.region) if n <= most)
        step = min(round_up(step, unit), most - most % unit)
        for a, b in common_slabs(source.region, target.region, begin, begin + rows):
            for first in range(a, b, step):
                for x, y in common_slabs(source.region, target.region, first, min(b, first + step)):
                    yield Box((x, *shared.start[1:]), (y - x, *shared.shape[1:]))

    def rank_plan(self, rank: int) -> RankPlan:
        """Plan one rank's part.

        Raises:
            PlanError: see `cells`.
        """
        plan, node = RankPlan(rank), self.node(rank)
        for family, cells in self.cells:
            for number, at in enumerate(family.instances(self.model)):
                name = ""
                for cell in cells:
                    holders = self._nodes(
                        "trainer", self.trainer.group(self.model, at, cell.source)
                    )
                    needers = self._nodes(
                        "rollout", self.rollout.group(self.model, at, cell.target)
                    )
                    wanted = rank in needers.get(node, ())
                    if not wanted and rank not in holders.get(node, ()):
                        continue
                    name = name or family.name(at)
                    turn = cell.first_turn + number * cell.turns
                    for box, there in self._held(name, cell, holders):
                        whole = Cell(name, box.start, box.shape)
                        route = _Route(whole, turn, there, needers)
                        if wanted:
                            route.receive(plan, node)
                        if rank in there.get(node, ()):
                            route.send(plan)
        return plan

    @functools.cached_property
    def _known(self) -> dict[tuple[str, Group], dict[int, Ranks]]:
        return {}

    def _nodes(self, side: str, group: Group) -> dict[int, Ranks]:
        """Return each node's ranks of a group."""
        key = (side, group)
        if key not in self._known:
            ranks = (self.trainer if side == "trainer" else self.rollout).ranks(group)
            found: dict[int, list[int]] = {}
            for rank in ranks:
                found.setdefault(self.node(rank), []).append(rank)
            self._known[key] = {node: tuple(members) for node, members in found.items()}
        return self._known[key]

    def _held(
        self, name: str, cell: _FamilyCell, holders: dict[int, Ranks]
    ) -> Iterator[tuple[Box, dict[int, Ranks]]]:
        """A cell in parts that some trainers hold whole, with these: node → its ranks.

        Raises:
            PlanError: where no trainer holds a part.
        """
        if self.ranges is None:
            yield cell.box, holders
            return
        ranks = [rank for members in holders.values() for rank in members]
        for part, there in self.ranges.parts(name, cell.box, cell.source.region, ranks):
            if not there:
                raise PlanError(f"no main copy holds {part.shape} of {name} from {part.start}")
            nodes = {
                node: tuple(rank for rank in members if rank in there)
                for node, members in holders.items()
            }
            nodes = {node: members for node, members in nodes.items() if members}
            begin, end = part.start[0], part.start[0] + part.shape[0]
            for a, b in common_slabs(cell.source.region, cell.target.region, begin, end):
                yield Box((a, *part.start[1:]), (b - a, *part.shape[1:])), nodes


@dataclass(frozen=True)
class _Route:
    """The senders and receivers of a cell.

    Attributes:
        turn: by which replicas take turns.
        holders, needers: node → its ranks.
    """

    cell: Cell
    turn: int
    holders: dict[int, Ranks]
    needers: dict[int, Ranks]

    def receive(self, plan: RankPlan, node: int) -> None:
        """Return how a rank that needs the cell gets it."""
        rank, cell = plan.rank, self.cell
        near, here = self.holders.get(node, ()), self.needers[node]
        if rank in near:
            plan.copies.append(cell)
        elif near:
            source = near[(self.turn + here.index(rank)) % len(near)]
            plan.direct.receives.setdefault(source, []).append(cell)
        else:
            landing = here[self.turn % len(here)]
            if rank == landing:
                plan.direct.receives.setdefault(self._replica(node), []).append(cell)
                for other in here:
                    if other != rank:
                        plan.fan_out.sends.setdefault(other, []).append(cell)
            else:
                plan.fan_out.receives.setdefault(landing, []).append(cell)

    def send(self, plan: RankPlan) -> None:
        """List the ranks to which a rank that has the cell sends it."""
        for node, here in self.needers.items():
            near = self.holders.get(node, ())
            if near:
                if plan.rank not in near:
                    continue
                for position, other in enumerate(here):
                    taken = other in near or near[(self.turn + position) % len(near)] != plan.rank
                    if not taken:
                        plan.direct.sends.setdefault(other, []).append(self.cell)
            elif self._replica(node) == plan.rank:
                landing = here[self.turn % len(here)]
                plan.direct.sends.setdefault(landing, []).append(self.cell)

    def _replica(self, node: int) -> int:
        """Choose the rank that serves another node, nodes in turn, so that NICs share the work."""
        turn, nodes = self.turn + node, sorted(self.holders)
        members = self.holders[nodes[turn % len(nodes)]]
        return members[turn // len(nodes) % len(members)]


def common_slabs(first: Region, second: Region, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Rows `[begin, end)` of the tensor, cut so that each run is one box in either region."""
    for a, b in slabs(first.row_sizes, begin - first.start[0], end - first.start[0]):
        low, high = a + first.start[0] - second.start[0], b + first.start[0] - second.start[0]
        for c, d in slabs(second.row_sizes, low, high):
            yield c + second.start[0], d + second.start[0]


def _units(*regions: Region) -> Iterator[int]:
    """Return numbers of rows at whose multiples a cut leaves few slabs."""
    yield 1
    for region in regions:
        for number in range(1, len(region.row_sizes)):
            yield math.prod(region.row_sizes[number:])


@functools.lru_cache(maxsize=4)
def rank_plan(planner: Planner, rank: int) -> RankPlan:
    """Plan one rank's part; the result is cached, since it depends on the layouts alone."""
    return planner.rank_plan(rank)


@functools.lru_cache(maxsize=4)
def rank_groups(planner: Planner, rank: int) -> list[RankPlan]:
    """Plan one rank's part by groups of tensors."""
    return rank_plan(planner, rank).split(planner.group_count, planner.group)


# What is under way to a rank at once, and what an end may have to hold of it.
BATCH_BYTES = 64 * 2**20
# A cell of as many elements is a message of its own; smaller ones are packed together.
ALONE_ELEMENTS = 2**19


def batches(cells: list[Cell], limit: int) -> Iterator[list[list[Cell]]]:
    """Divide cells into batches, and each batch into messages.

    Args:
        limit: elements of a batch at most; a cell that is larger is a batch.
    """
    taken: list[Cell] = []
    filled = 0
    for cell in cells:
        if taken and filled + cell.numel > limit:
            yield _messages(taken)
            taken, filled = [], 0
        taken.append(cell)
        filled += cell.numel
    if taken:
        yield _messages(taken)


def _messages(cells: list[Cell]) -> list[list[Cell]]:
    large = [[cell] for cell in cells if cell.numel >= ALONE_ELEMENTS]
    small = [cell for cell in cells if cell.numel < ALONE_ELEMENTS]
    return [*large, small] if small else large
