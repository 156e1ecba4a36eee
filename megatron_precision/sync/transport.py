"""A rank's plan carried out on live tensors: local copies, and few packed messages.

Binding a plan to tensors finds the strided view of every cell once, and its place in a buffer; a
run then packs, sends and unpacks with grouped copies, and converts dtypes on the way. Messages
travel in batches. A large cell is a message of its own, and an end whose view of it is one run of
the wire's dtype sends or receives in place. Buffers are two batches large at most, whatever the
model's size.

Ranks meet in turns: in turn `t` a rank sends to the rank `t` after it and receives from the rank
`t` before it. Both ends know all batches of a turn, so none is announced, and a turn without any
costs nothing.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from megatron_precision.layouts.regions import Region
from megatron_precision.sync.plan import BATCH_BYTES, Cell, Exchange, PlanError, RankPlan, batches

# Regions on this rank, each with the tensor of its parameter.
RegionTensors = Iterable[tuple[Region, torch.Tensor]]


@dataclass(frozen=True)
class _Message:
    """Cells that travel together: their views, and their number of elements."""

    views: list[torch.Tensor]
    numel: int

    def in_place(self, wire: torch.dtype) -> torch.Tensor | None:
        """The message itself, flat, where it needs no buffer at this end."""
        view = self.views[0]
        if len(self.views) == 1 and view.dtype == wire and view.is_contiguous():
            return view.view(-1)
        return None

    def slices(self, buffer: torch.Tensor) -> list[torch.Tensor]:
        """The buffer's part of each view, in its shape."""
        found, begin = [], 0
        for view in self.views:
            found.append(buffer[begin : begin + view.numel()].view(view.shape))
            begin += view.numel()
        return found


@dataclass(frozen=True)
class _Batch:
    """Messages to or from one rank that are under way together."""

    peer: int
    messages: list[_Message]

    def buffered(self, wire: torch.dtype) -> int:
        """Elements that need a buffer at this end."""
        return sum(m.numel for m in self.messages if m.in_place(wire) is None)


@dataclass(frozen=True)
class _End:
    """A batch bound to a buffer.

    Attributes:
        operations: one a message.
        views, slices: of the cells that go through the buffer, there and in it.
    """

    operations: list[dist.P2POp]
    views: list[torch.Tensor]
    slices: list[torch.Tensor]

    @classmethod
    def of(cls, batch: _Batch | None, way: Callable[..., Any], buffer: torch.Tensor) -> _End:
        """Bind a batch to a buffer; None without a batch."""
        end = cls([], [], [])
        begin = 0
        for message in batch.messages if batch else ():
            memory = message.in_place(buffer.dtype)
            if memory is None:
                memory = buffer[begin : begin + message.numel]
                begin += message.numel
                end.views.extend(message.views)
                end.slices.extend(message.slices(memory))
            assert batch is not None
            end.operations.append(dist.P2POp(way, memory, batch.peer))
        return end


@dataclass(frozen=True)
class _Step:
    """At most a batch to one rank and one from another, under way together."""

    receive: _End
    send: _End

    def run(self) -> None:
        """Pack, send and receive, unpack: a few launches, whatever the number of cells."""
        if self.send.views:
            torch._foreach_copy_(self.send.slices, self.send.views)
        # Together: with NCCL, ends that each wait for their first operation wait forever.
        for work in dist.batch_isend_irecv([*self.receive.operations, *self.send.operations]):
            work.wait()
        if self.receive.views:
            torch._foreach_copy_(self.receive.views, self.receive.slices)


@dataclass(frozen=True)
class _Turn:
    """Batches to one rank and from one rank."""

    sends: list[_Batch]
    receives: list[_Batch]


@dataclass(frozen=True)
class _Group:
    """A part of the plan, bound to tensors: local copies, then messages in turns.

    Attributes:
        copy_from, copy_to: views of the cells that the rank has and needs.
        through_wire: a copy at once would round otherwise than what comes from another rank.
        turns: of both rounds.
    """

    copy_from: list[torch.Tensor]
    copy_to: list[torch.Tensor]
    through_wire: bool
    turns: list[_Turn]

    @functools.cached_property
    def lots(self) -> list[list[int]]:
        """Group the cells that are copied together: those of one run on both sides, and the
        others. On a GPU the former are one launch, and each of the latter is one."""
        ends = zip(self.copy_to, self.copy_from, strict=True)
        runs = [all(view.is_contiguous() for view in pair) for pair in ends]
        split = [[n for n, run in enumerate(runs) if run == wanted] for wanted in (True, False)]
        return [lot for lot in split if lot]

    def steps(self, received: torch.Tensor, sent: torch.Tensor) -> list[_Step]:
        """The turns bound to the buffers."""
        return [
            _Step(_End.of(here, dist.irecv, received), _End.of(there, dist.isend, sent))
            for turn in self.turns
            for here, there in itertools.zip_longest(turn.receives, turn.sends)
        ]


class Transport:
    """One rank's plan, bound to its tensors.

    Args:
        groups: the plan's parts, in the order in which they run; all ranks have as many.
        sources: the trainer's regions on this rank, with the live parameter of each.
        targets: the engine's regions on this rank, with the tensor of each in loader layout.
        wire: dtype of what is sent.
        world_size: ranks that take part.
        batch_bytes: what is under way to a rank at once; two such buffers are held at most.
        firsts: of the sources, see `Views`.

    Attributes:
        bytes: that a run of all groups brings to this rank's engine, in the wire's dtype.
        received_bytes: of these, from other ranks.

    Raises:
        PlanError: where a cell of the plan is in no region: the layout is another than planned.
    """

    def __init__(
        self,
        groups: Sequence[RankPlan],
        sources: RegionTensors,
        targets: RegionTensors,
        *,
        wire: torch.dtype,
        world_size: int,
        batch_bytes: int = BATCH_BYTES,
        firsts: Mapping[str, int] | None = None,
    ) -> None:
        have, need = Views(sources, "the trainer", firsts), Views(targets, "the engine")
        self._wire = wire
        limit = batch_bytes // wire.itemsize
        self._groups = [_bind(plan, have, need, wire, world_size, limit) for plan in groups]
        turns = [turn for group in self._groups for turn in group.turns]
        sends = [batch for turn in turns for batch in turn.sends]
        receives = [batch for turn in turns for batch in turn.receives]
        self._out, self._in = _buffer(sends, wire), _buffer(receives, wire)
        self._steps = [group.steps(self._in, self._out) for group in self._groups]
        received = sum(message.numel for batch in receives for message in batch.messages)
        copied = sum(view.numel() for group in self._groups for view in group.copy_to)
        self.received_bytes = received * wire.itemsize
        self.bytes = self.received_bytes + copied * wire.itemsize

    @property
    def buffer_bytes(self) -> int:
        """The bytes of the buffers."""
        return self._out.nbytes + self._in.nbytes

    @torch.no_grad()
    def run(self, group: int) -> None:
        """Update a group's tensors; every rank of the world calls it, in order."""
        part = self._groups[group]
        if part.through_wire:
            for target, source in zip(part.copy_to, part.copy_from, strict=True):
                target.copy_(source.to(self._wire))
        else:
            for lot in part.lots:
                targets, sources = [part.copy_to[n] for n in lot], [part.copy_from[n] for n in lot]
                torch._foreach_copy_(targets, sources)
        for step in self._steps[group]:
            step.run()


class Views:
    """Finds cells as strided views of one side's tensors.

    Args:
        held: every region on this rank, with its parameter's tensor.
        side: "the trainer" or "the engine", for error messages.
        firsts: for a parameter of which this rank has only a flat range of elements: the
            position of the range's first element, by the parameter's name.
    """

    def __init__(
        self, held: RegionTensors, side: str, firsts: Mapping[str, int] | None = None
    ) -> None:
        self._side, self._firsts = side, firsts or {}
        self._held: dict[str, list[tuple[Region, torch.Tensor]]] = {}
        for region, tensor in held:
            self._held.setdefault(region.hf_name, []).append((region, tensor))

    def of(self, cell: Cell) -> torch.Tensor:
        """Return the strided view of a cell.

        Raises:
            PlanError: where no region holds it.
        """
        region, tensor = self.holder(cell)
        if region.parameter not in self._firsts:
            return view_of(cell, region, tensor)
        # The view that the whole parameter would have, from the range's first element.
        whole = view_of(cell, region, torch.empty(region.view, device="meta"))
        begin = whole.storage_offset() - self._firsts[region.parameter]
        extent = sum((n - 1) * s for n, s in zip(whole.shape, whole.stride(), strict=True))
        if begin < 0 or begin + extent >= tensor.numel():
            raise self._missing(cell)
        return tensor.as_strided(whole.shape, whole.stride(), tensor.storage_offset() + begin)

    def holder(self, cell: Cell) -> tuple[Region, torch.Tensor]:
        """Return the region that contains a cell, and the tensor of its parameter.

        Raises:
            PlanError: where no region holds it.
        """
        for region, tensor in self._held.get(cell.hf_name, ()):
            if region.holds(cell.start, cell.shape):
                return region, tensor
        raise self._missing(cell)

    def _missing(self, cell: Cell) -> PlanError:
        return PlanError(
            f"{self._side} does not hold {cell.shape} of {cell.hf_name} from {cell.start} on this "
            "rank: its layout is not the one that was planned for"
        )


def view_of(cell: Cell, region: Region, tensor: torch.Tensor) -> torch.Tensor:
    """Return the strided view of a cell in the tensor of the region's parameter."""
    return tensor.view(region.view)[region.within(cell.start, cell.shape)]


def _bind(
    plan: RankPlan, have: Views, need: Views, wire: torch.dtype, world_size: int, limit: int
) -> _Group:
    copy_from = [have.of(cell) for cell in plan.copies]
    # The engine's views are rows; the trainer's may be rows by group and head.
    copy_to = [
        need.of(cell).view(view.shape) for cell, view in zip(plan.copies, copy_from, strict=True)
    ]
    turns = [
        turn
        for exchange, source in ((plan.direct, have), (plan.fan_out, need))
        for turn in _turns(plan.rank, world_size, exchange, source, need, limit)
    ]
    ends = zip(copy_from, copy_to, strict=True)
    through_wire = any(wire not in (source.dtype, target.dtype) for source, target in ends)
    return _Group(copy_from, copy_to, through_wire, turns)


def _turns(
    rank: int, world_size: int, exchange: Exchange, sources: Views, targets: Views, limit: int
) -> Iterator[_Turn]:
    for distance in range(1, world_size):
        to, origin = (rank + distance) % world_size, (rank - distance) % world_size
        sends = _batches(to, exchange.sends.get(to, []), sources, limit)
        receives = _batches(origin, exchange.receives.get(origin, []), targets, limit)
        if sends or receives:
            yield _Turn(sends, receives)


def _batches(peer: int, cells: list[Cell], views: Views, limit: int) -> list[_Batch]:
    def message(together: list[Cell]) -> _Message:
        found = [views.of(cell) for cell in together]
        return _Message(found, sum(cell.numel for cell in together))

    return [_Batch(peer, [message(m) for m in batch]) for batch in batches(cells, limit)]


def _buffer(sent_or_received: list[_Batch], wire: torch.dtype) -> torch.Tensor:
    """Allocate a buffer for the largest batch."""
    longest = max((batch.buffered(wire) for batch in sent_or_received), default=0)
    device = "cpu"
    if sent_or_received:
        device = sent_or_received[0].messages[0].views[0].device.type
    return torch.empty(longest, dtype=wire, device=device)
