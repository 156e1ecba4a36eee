"""Main copies in flat ranges: which elements of a parameter each data-parallel rank holds.

Megatron's distributed optimizer lays all parameters end to end and divides them, wherever that
cuts one. A rank's part of a parameter is one range of its elements, and the cuts are no box's
edges: a cell is cut at each, in the middle of a row if need be, so that every part lies whole in
one range.

Plain integers throughout: neither torch nor an engine is needed.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from megatron_precision.layouts.regions import Box, Region

# Rows and columns `[begin, end)` of a region, counted from its own first.
_Part = tuple[int, int, int, int]


@dataclass(frozen=True)
class FlatRange:
    """A rank's range of the parameter that a region is in.

    Attributes:
        hf_name, start: name the region.
        begin, end: elements of the parameter, in row-major order.
    """

    hf_name: str
    start: tuple[int, ...]
    begin: int
    end: int


@dataclass(frozen=True)
class FlatRanges:
    """Every rank's ranges; a region that is not listed is whole.

    Attributes:
        by_rank: from the world's first rank on; of a rank that is no trainer, none.
    """

    by_rank: tuple[tuple[FlatRange, ...], ...]

    @functools.cached_property
    def _known(self) -> dict[tuple[int, str, tuple[int, ...]], tuple[int, int]]:
        return {
            (rank, held.hf_name, held.start): (held.begin, held.end)
            for rank, ranges in enumerate(self.by_rank)
            for held in ranges
        }

    def parts(
        self, hf_name: str, box: Box, region: Region, ranks: Sequence[int]
    ) -> Iterator[tuple[Box, tuple[int, ...]]]:
        """Cut a box of a region into parts, each with the ranks that have it whole.

        Args:
            hf_name: the tensor; the region may be that of another layer.
            box: in the coordinates of the tensor.
            ranks: those whose parameters the region is in.
        """
        held = {rank: self._known.get((rank, hf_name, region.start)) for rank in ranks}
        columns = math.prod(region.shape[1:])
        row = box.start[0] - region.start[0]
        column = box.start[1] - region.start[1] if len(box.start) > 1 else 0
        parts: list[_Part] = [(row, row + box.shape[0], column, column + math.prod(box.shape[1:]))]
        for edge in sorted({edge for found in held.values() if found for edge in found}):
            at = divmod(region.elements_before(edge), columns)
            parts = [part for whole in parts for part in _cut(whole, *at)]
        for a, b, c, d in parts:
            first = region.position(a * columns + c)
            there = tuple(
                rank for rank, found in held.items() if not found or found[0] <= first < found[1]
            )
            start, shape = (region.start[0] + a,), (b - a,)
            if len(box.start) > 1:
                start, shape = (*start, region.start[1] + c), (*shape, d - c)  # type: ignore[assignment]
            yield Box(start, shape), there


def _cut(part: _Part, row: int, column: int) -> Iterator[_Part]:
    """Cut a part before an element, into whole rows and pieces of a row."""
    a, b, c, d = part
    if column >= d:
        row, column = row + 1, c
    column = max(c, column)
    if not a <= row < b:
        yield part
        return
    if a < row:
        yield a, row, c, d
    if column > c:
        yield row, row + 1, c, column
        yield row, row + 1, column, d
        row += 1
    if row < b:
        yield row, b, c, d
