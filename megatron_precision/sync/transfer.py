"""Binds one rank's part of the plan to live tensors, carries it out, and proves the result.

`EngineSide` is what a rank's engine must offer. vLLM's is `rollout/engine_weights.py`, and
`rollout/weight_transfer.py` makes this module a backend of vLLM's weight transfer.

Before anything is bound, `misfits` looks for all of an engine's parameters in the plan, and for all
of the plan in the tensors. With the plan of another layout, a part of an engine could keep its old
weights, and no checksum of what was sent would tell.
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
from megatron_precision.layouts.vllm import vllm_regions
from megatron_precision.sync.plan import (
    BATCH_BYTES,
    Cell,
    PlanError,
    Planner,
    RankPlan,
    rank_groups,
    rank_plan,
)
from megatron_precision.sync.transport import RegionTensors, Transport, Views, view_of
from megatron_precision.sync.verify import RegionProof, checksum, columns_of

Named = TypeVar("Named", Cell, Region)


def misfits(
    groups: Sequence[RankPlan], sources: RegionTensors, targets: RegionTensors
) -> list[str]:
    """A line for each tensor of which this rank has other boxes than were planned for.

    Args:
        groups: the rank's plan, in parts.
        sources: the trainer's regions on this rank.
        targets: the engine's regions on this rank.
    """
    held = _by_name(cell for plan in groups for cell in plan.held)
    needed = _by_name(cell for plan in groups for cell in plan.needed)
    there, here = (
        _by_name(region for region, _ in sources),
        _by_name(region for region, _ in targets),
    )
    lines = [
        f"{name}: the {side} has no {list(cells[0].shape)} from {list(cells[0].start)} on this rank"
        for side, planned, regions in (("trainer", held, there), ("engine", needed, here))
        for name, cells in _lost(planned, regions)
    ]
    for name, regions in here.items():
        for region in regions:
            cells = (c for c in needed.get(name, ()) if region.holds(c.start, c.shape))
            box = Box(region.start, region.shape)
            if wrong := not_once(box, [Box(cell.start, cell.shape) for cell in cells]):
                lines.append(
                    f"{name}: the plan covers {wrong} of what {region.parameter} has of it"
                )
    return lines


def _by_name(found: Iterable[Named]) -> dict[str, list[Named]]:
    names: dict[str, list[Named]] = {}
    for one in found:
        names.setdefault(one.hf_name, []).append(one)
    return names


def _lost(
    planned: dict[str, list[Cell]], regions: dict[str, list[Region]]
) -> Iterator[tuple[str, list[Cell]]]:
    """Yield each tensor with the planned cells that no region contains."""
    for name, cells in planned.items():
        here = regions.get(name, [])
        lost = [c for c in cells if not any(region.holds(c.start, c.shape) for region in here)]
        if lost:
            yield name, lost


# Staged parameters begin at multiples of this many elements, aligned as an allocator would.
_ALIGNMENT = 64
# An error message names at most this many tensors.
_SHOWN = 10


class Parameter(Protocol):
    """One parameter of a rank's engine."""

    @property
    def name(self) -> str:
        """Its name in the engine's model."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape in the layout of the engine's loader."""
        ...

    @property
    def staged(self) -> bool:
        """Whether it is staged and loaded whole, because it cannot be written in place."""
        ...

    @property
    def live(self) -> torch.Tensor:
        """The tensor that is written in place."""
        ...


class EngineSide(Protocol):
    """What the sync needs of a rank's engine."""

    @property
    def parameters(self) -> Sequence[Parameter]:
        """All parameters; one that several layers share appears once."""
        ...

    def load(self, staged: Mapping[str, torch.Tensor]) -> None:
        """Load the staged parameters of whole layers."""
        ...

    def refresh_tied_head(self) -> None:
        """Update an output layer that is tied to the embedding, which was just written."""
        ...

    def reads(self, name: str) -> list[torch.Tensor]:
        """Return what each kernel that uses the parameter reads, in the loader's layout."""
        ...


@dataclass(frozen=True)
class Proof:
    """The result of comparing both sides on this rank.

    Attributes:
        regions: number of cells compared.
        differing: a line for each cell that differs.
    """

    regions: int
    differing: list[str]


class Transfer:
    """Runs and proves one rank's part of every sync between two layouts.

    Args:
        planner: both layouts.
        sources: the trainer's regions on this rank; empty if no trainer runs here.
        engine: this rank's engine; None if it has none.
        at: this rank's coordinates in its engine.
        wire: dtype in which weights are sent.
        dtype: dtype of the engine's parameters.
        batch_bytes: most bytes on their way to a rank at once; at most two such buffers exist.
        firsts: for a parameter of which this rank has only a flat range of elements: the
            position of the range's first element, by the parameter's name.

    Attributes:
        proof: the trainers' part of the proof.

    Raises:
        PlanError: if a side's tensors differ from the plan; names them and both layouts.
        EngineLayoutError: if the layout of a kernel is not known.
    """

    def __init__(
        self,
        planner: Planner,
        sources: RegionTensors,
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
        self._regions = {
            p.name: vllm_regions(p.name, p.shape, planner.model, at) for p in parameters
        }
        self._staged = self._place(parameters, dtype)
        tensors = {p.name: p.live for p in parameters} | {
            name: tensor for staged in self._staged for name, tensor in staged.items()
        }
        targets = [
            (region, tensors[name]) for name, regions in self._regions.items() for region in regions
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
        """Bytes of the staging buffer: the staged parameters of the largest group."""
        return self._stage.nbytes

    def run(self) -> None:
        """Update the engine's weights; every rank must call this."""
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
        """Compare the trainers' weights with what the kernels read; every rank must call this."""
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
        """Return the cells of a parameter that some kernel reads with other values."""
        assert self.engine is not None, "no cell is needed where there is no engine"
        wrong: dict[Cell, None] = {}
        for tensor in self.engine.reads(name):
            read = tensor.to(self._dtype)
            views = [(cell, view_of(cell, region, read)) for cell, region in cells]
            found = torch.stack([checksum(v, columns_of(cell.shape)) for cell, v in views]).tolist()
            pairs = zip(cells, found, strict=True)
            wrong |= {cell: None for (cell, _), value in pairs if value != expected[cell]}
        return list(wrong)

    def _place(
        self, parameters: Sequence[Parameter], dtype: torch.dtype
    ) -> list[dict[str, torch.Tensor]]:
        """Place the staged parameters of each group in one buffer that all groups reuse."""
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
    """Group cells by the engine's parameter, so that each parameter is read once."""
    found: dict[str, list[tuple[Cell, Region]]] = {}
    for cell in cells:
        region, _ = targets.holder(cell)
        found.setdefault(region.parameter, []).append((cell, region))
    return found
