"""Whether a rank's plan fits the tensors that it is bound to: a layout may have changed.

With a plan of another layout a part of an engine could stay as it was, and no checksum of what was
sent would tell. So all of an engine's parameters are looked for in the plan, and all of the plan in
the tensors, before anything is bound.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch

from megatron_precision.weights.boxes import Box, not_once
from megatron_precision.weights.plan import Cell, RankPlan
from megatron_precision.weights.regions import Piece

Held = Iterable[tuple[Piece, torch.Tensor]]
Named = TypeVar("Named", Cell, Piece)


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
    planned: dict[str, list[Cell]], pieces: dict[str, list[Piece]]
) -> Iterator[tuple[str, list[Cell]]]:
    """Tensors with the cells that no piece holds."""
    for name, cells in planned.items():
        here = pieces.get(name, [])
        lost = [c for c in cells if not any(piece.holds(c.start, c.shape) for piece in here)]
        if lost:
            yield name, lost
