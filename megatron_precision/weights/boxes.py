"""Boxes of a tensor: what two share, and whether some make another one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Box:
    """A box of a tensor: its first element and its size, per dimension."""

    start: tuple[int, ...]
    shape: tuple[int, ...]


def overlap(a: Box, b: Box) -> Box | None:
    """The box that two boxes share, if any."""
    start = tuple(map(max, a.start, b.start))
    end = tuple(
        min(x + n, y + m) for x, n, y, m in zip(a.start, a.shape, b.start, b.shape, strict=True)
    )
    if any(low >= high for low, high in zip(start, end, strict=True)):
        return None
    return Box(start, tuple(high - low for low, high in zip(start, end, strict=True)))


def not_once(whole: Box, parts: Sequence[Box]) -> str:
    """How much of a box is covered, unless its parts cover each element once: then nothing."""
    inside = [part for part in (overlap(whole, p) for p in parts) if part is not None]
    covered = sum(math.prod(part.shape) for part in parts)
    twice, open_parts = 0, list[Box]()
    for part in sorted(inside, key=lambda box: box.start):
        open_parts = [p for p in open_parts if p.start[0] + p.shape[0] > part.start[0]]
        shared = (overlap(part, other) for other in open_parts)
        twice += sum(math.prod(box.shape) for box in shared if box is not None)
        open_parts.append(part)
    if twice:
        return f"{twice} elements more than once, in unlike boxes, out of {math.prod(whole.shape)}"
    if covered != math.prod(whole.shape) or inside != list(parts):
        return f"{covered} of {math.prod(whole.shape)} elements"
    return ""
