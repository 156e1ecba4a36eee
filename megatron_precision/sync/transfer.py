"""One rank's part of every sync: the plan bound to live tensors, carried out, and proven.

Whichever side a rank is on, and whatever its engine is: what an engine has to offer is
`EngineSide`. vLLM's is `rollout/engine_weights.py`, and `rollout/weight_transfer.py` makes this a
backend of vLLM's weight transfer.

Whether a rank's plan fits the tensors that it is bound to: a layout may have changed.

With a plan of another layout a part of an engine could stay as it was, and no checksum of what was
sent would tell. So all of an engine's parameters are looked for in the plan, and all of the plan in
the tensors, before anything is bound.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist

from megatron_precision.layouts.megatron import ShardCoordinates
from megatron_precision.layouts.regions import Box, Region, not_once
from megatron_precision.layouts.vllm import vllm_pieces
from megatron_precision.sync.plan import (
    BATCH_BYTES,
    Cell,
    PlanError,
    Planner,
    RankPlan,
    rank_groups,
    rank_plan,
)
from megatron_precision.sync.transport import Held, Transport, Views, view_of
from megatron_precision.sync.verify import RegionProof, checksum, columns_of

Named = TypeVar("Named", Cell, Region)


def misfits(groups: Sequence[RankPlan], sources: Held, targets: Held) -> list[str]:
    """A line for each tensor of which this rank has other boxes than were planned for.

    Args:
        groups: the rank's plan, in parts.
        sources: the trainer's pieces on this rank.
        targets: the engine's.
    """
    held = _by_name(cell for plan in groups for cell in plan.held)
    needed = _by_name(cell for plan in groups for cell in plan.needed)
    there, here = _by_name(piece for piece, _ in sources), _by_name(piece for piece, _ in targets)
    lines = [
        f"{name}: the {side} has no {list(cells[0].shape)} from {list(cells[0].start)} on this rank"
        for side, planned, pieces in (("trainer", held, there), ("engine", needed, here))
        for name, cells in _lost(planned, pieces)
    ]
    for name, pieces in here.items():
        for piece in pieces:
            cells = (c for c in needed.get(name, ()) if piece.holds(c.start, c.shape))
            box = Box(piece.start, piece.shape)
            if wrong := not_once(box, [Box(cell.start, cell.shape) for cell in cells]):
                lines.append(f"{name}: the plan covers {wrong} of what {piece.parameter} has of it")
    return lines


def _by_name(found: Iterable[Named]) -> dict[str, list[Named]]:
    names: dict[str, list[Named]] = {}
    for one in found:
        names.setdefault(one.hf_name, []).append(one)
    return names


def _lost(
    planned: dict[str, list[Cell]], pieces: dict[str, list[Region]]
) -> Iterator[tuple[str, list[Cell]]]:
    """Tensors with the cells that no piece holds."""
    for name, cells in planned.items():
        here = pieces.get(name, [])
        lost = [c for c in cells if not any(piece.holds(c.start, c.shape) for piece in here)]
        if lost:
            yield name, lost


# Staged parameters begin at multiples of this, as the allocator would align them.
_ALIGNMENT = 64
# Tensors that a message names.
_SHOWN = 10


class Parameter(Protocol):
    """One parameter of an engine's rank."""

    @property
    def name(self) -> str:
        """In the engine's model."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """In the layout of the engine's loader."""
        ...

    @property
    def staged(self) -> bool:
        """Whether it is handed over whole, and not written in place."""
        ...

    @property
    def live(self) -> torch.Tensor:
        """What is written in place."""
        ...


class EngineSide(Protocol):
    """A rank's engine."""

    @property
    def parameters(self) -> Sequence[Parameter]:
        """All of them; one that several layers share, once."""
        ...

    def load(self, staged: Mapping[str, torch.Tensor]) -> None:
        """Take the staged parameters of whole layers."""
        ...

    def refresh_tied_head(self) -> None:
        """Follow an embedding that has just been written."""
        ...

    def reads(self, name: str) -> list[torch.Tensor]:
        """What every kernel that uses a parameter reads, in the layout of the loader."""
        ...


@dataclass(frozen=True)
class Proof:
    """What a comparison of both sides found on this rank.

    Attributes:
        regions: cells compared.
        differing: a line for each that differs.
    """

    regions: int
    differing: list[str]


class Transfer:
    """One rank's part of every sync between two layouts.

    Args:
        planner: both layouts.
        sources: the trainer's pieces on this rank; none where it is no trainer.
        engine: this rank's engine; None where it has none.
        at: where this rank stands in its engine.
        wire: dtype of what is sent.
        dtype: of the engine's parameters.
        batch_bytes: what is under way to a rank at once; two such buffers are held at most.
        firsts: by parameter of which a range of elements is held, flat, its first element.

    Attributes:
        proof: the trainers' part of the proof.

    Raises:
        PlanError: names what either side has otherwise than planned, and both layouts.
        EngineLayoutError: for a kernel whose layout is not known.
    """

    def __init__(
        self,
        planner: Planner,
        sources: Held,
        engine: EngineSide | None,
        at: ShardCoordinates,
        *,
        wire: torch.dtype,
        dtype: torch.dtype,
        batch_bytes: int = BATCH_BYTES,
        firsts: Mapping[str, int] | None = None,
    ) -> None:
        self._planner, self.engine = planner, engine
        parameters: Sequence[Parameter] = engine.parameters if engine else []
        self._pieces = {p.name: vllm_pieces(p.name, p.shape, planner.model, at) for p in parameters}
        self._staged = self._place(parameters, dtype)
        tensors = {p.name: p.live for p in parameters} | {
            name: tensor for staged in self._staged for name, tensor in staged.items()
        }
        targets = [
            (piece, tensors[name]) for name, pieces in self._pieces.items() for piece in pieces
        ]
        sources = list(sources)
        groups = rank_groups(planner, dist.get_rank())
        if wrong := misfits(groups, sources, targets):
            more = [f"... and {len(wrong) - _SHOWN} more"] * (len(wrong) > _SHOWN)
            lines = "\n  ".join([*wrong[:_SHOWN], *more])
            raise PlanError(
                "these layouts are not the ones that were planned for:\n  "
                f"{lines}\nplanned for\n{planner.layouts}"
            )
        self.transport = Transport(
            groups,
            sources,
            targets,
            wire=wire,
            world_size=dist.get_world_size(),
            batch_bytes=batch_bytes,
            firsts=firsts,
        )
        views = Views(sources, "the trainer", firsts)
        self._dtype = dtype
        plan = rank_plan(planner, dist.get_rank())
        self.proof = RegionProof(plan, views, wire=wire, engine=dtype)
        self._needed = _by_parameter(self.proof.needed, Views(targets, "the engine"))

    @property
    def staging_bytes(self) -> int:
        """What staging takes: the largest group's staged parameters."""
        return self._stage.nbytes

    def run(self) -> None:
        """Bring the engine up to date; every rank calls it."""
        for group, staged in enumerate(self._staged):
            for tensor in staged.values():
                tensor.zero_()  # padding stays zero; the buffer held another layer's numbers
            self.transport.run(group)
            if self.engine is None:
                continue
            self.engine.load(staged)
            if group == 0:
                self.engine.refresh_tied_head()

    @torch.no_grad()
    def prove(self) -> Proof:
        """Compare what the trainers hold with what the kernels read; every rank calls it."""
        expected = self.proof.arrived(self.proof.held())
        lines = [
            f"{name}: {list(cell.shape)} of {cell.hf_name} from {list(cell.start)} differs"
            for name, cells in self._needed.items()
            for cell in self._differing(name, cells, expected)
        ]
        return Proof(len(expected), lines)

    def _differing(
        self, name: str, cells: list[tuple[Cell, Region]], expected: Mapping[Cell, int]
    ) -> list[Cell]:
        """The cells of a parameter that some kernel reads otherwise."""
        assert self.engine is not None, "no cell is needed where there is no engine"
        wrong: dict[Cell, None] = {}
        for tensor in self.engine.reads(name):
            read = tensor.to(self._dtype)
            views = [(cell, view_of(cell, piece, read)) for cell, piece in cells]
            found = torch.stack([checksum(v, columns_of(cell.shape)) for cell, v in views]).tolist()
            pairs = zip(cells, found, strict=True)
            wrong |= {cell: None for (cell, _), value in pairs if value != expected[cell]}
        return list(wrong)

    def _place(
        self, parameters: Sequence[Parameter], dtype: torch.dtype
    ) -> list[dict[str, torch.Tensor]]:
        """Room for the staged parameters of each group, in one buffer that all groups use."""
        groups: list[list[Parameter]] = [[] for _ in range(self._planner.group_count)]
        for parameter in parameters:
            if parameter.staged:
                groups[self._planner.group(parameter.name)].append(parameter)

        def room(parameter: Parameter) -> int:
            return -(-math.prod(parameter.shape) // _ALIGNMENT) * _ALIGNMENT

        longest = max(sum(room(p) for p in group) for group in groups)
        device = parameters[0].live.device if parameters else torch.device("cpu")
        self._stage = torch.zeros(longest, dtype=dtype, device=device)
        placed = []
        for group in groups:
            begin, tensors = 0, {}
            for parameter in group:
                end = begin + math.prod(parameter.shape)
                tensors[parameter.name] = self._stage[begin:end].view(parameter.shape)
                begin += room(parameter)
            placed.append(tensors)
        return placed


def _by_parameter(cells: list[Cell], targets: Views) -> dict[str, list[tuple[Cell, Region]]]:
    """The cells that an engine's parameters hold: each is read once, whatever it is made of."""
    found: dict[str, list[tuple[Cell, Region]]] = {}
    for cell in cells:
        piece, _ = targets.holder(cell)
        found.setdefault(piece.parameter, []).append((cell, piece))
    return found
