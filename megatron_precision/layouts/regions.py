"""Says which box of a Hugging Face tensor each part of a local parameter is.

A Hugging Face checkpoint is the common language of trainer and engine. A rank's parameter contains
one or more boxes of such tensors, each as a strided view of the parameter. A `Region` states this
in plain integers and needs neither torch nor an engine, so plans can be made and tested for any
layout on any machine. `Box` is a box alone: `overlap` intersects two, and `not_once` checks that
some boxes tile another.

A region's `start` and `shape` are coordinates in the Hugging Face tensor; `view` and `index` say
where the region is in the parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Span = tuple[int, int]


@dataclass(frozen=True)
class Region:
    """A box of a Hugging Face tensor, as a strided view of a local parameter.

    Attributes:
        hf_name: the Hugging Face tensor.
        start: first element of the box, per dimension of the Hugging Face tensor.
        shape: size of the box, per dimension of the Hugging Face tensor.
        parameter: the local parameter's own name.
        view: the shape to view the parameter as before indexing it.
        index: a `[begin, end)` span per dimension of `view`; the spanned sub-view, flattened in
            row-major order, is the box flattened in row-major order.
    """

    hf_name: str
    start: tuple[int, ...]
    shape: tuple[int, ...]
    parameter: str
    view: tuple[int, ...]
    index: tuple[Span, ...]

    def __post_init__(self) -> None:
        spanned = math.prod(end - begin for begin, end in self.index)
        if spanned != math.prod(self.shape):
            raise ValueError(
                f"{self.parameter}: a view of {spanned} elements cannot hold a box of "
                f"{math.prod(self.shape)} elements of {self.hf_name}"
            )

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def box(self) -> tuple[slice, ...]:
        """Indexes the Hugging Face tensor; the result has `shape`."""
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.shape, strict=True))

    @property
    def spans(self) -> tuple[slice, ...]:
        """Indexes the parameter viewed as `view`."""
        return tuple(slice(begin, end) for begin, end in self.index)

    @property
    def row_sizes(self) -> tuple[int, ...]:
        """Sizes of the leading dimensions of the spanned view; their product is the box's rows."""
        leading = len(self.view) - (len(self.shape) - 1)
        return tuple(end - begin for begin, end in self.index[:leading])

    def position(self, number: int) -> int:
        """Convert an element's position in the box to its position in the parameter, row-major."""
        found, inner = 0, 1
        for size, (begin, end) in zip(reversed(self.view), reversed(self.index), strict=True):
            number, at = divmod(number, end - begin)
            found += (begin + at) * inner
            inner *= size
        return found

    def elements_before(self, position: int) -> int:
        """Count the elements of the box before a row-major position in the parameter."""
        found, inner, boxed = 0, math.prod(self.view), self.numel
        for size, (begin, end) in zip(self.view, self.index, strict=True):
            inner, boxed = inner // size, boxed // (end - begin)
            at, position = divmod(position, inner)
            found += (min(max(at, begin), end) - begin) * boxed
            if not begin <= at < end:
                break
        return found

    def holds(self, start: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        """Return whether the region contains this box of the Hugging Face tensor."""
        ends = zip(self.start, self.shape, start, shape, strict=True)
        return all(a <= b and b + m <= a + n for a, n, b, m in ends)

    def within(self, start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Return the index into `view` of a smaller box whose rows are one of the `slabs`.

        Args:
            start, shape: the box, in coordinates of the Hugging Face tensor.

        Raises:
            ValueError: if the box is not inside the region, or its rows are not one slab.
        """
        low = tuple(a - b for a, b in zip(start, self.start, strict=True))
        if not self.holds(start, shape):
            raise ValueError(
                f"{self.hf_name}: {start} + {shape} leaves {self.start} + {self.shape}"
            )
        sizes = self.row_sizes
        spans = list(_slab_spans(sizes, low[0], low[0] + shape[0]))
        spans += [(a, a + n) for a, n in zip(low[1:], shape[1:], strict=True)]
        return tuple(
            slice(first + a, first + b)
            for (first, _), (a, b) in zip(self.index, spans, strict=True)
        )


def round_up(count: int, multiple: int) -> int:
    """Round `count` up to a multiple of `multiple`."""
    return -(-count // multiple) * multiple


def slabs(sizes: tuple[int, ...], begin: int, end: int) -> list[Span]:
    """Cut the flattened rows `[begin, end)` of dimensions `sizes` into the fewest boxes.

    >>> slabs((4, 3), 2, 11)
    [(2, 3), (3, 9), (9, 11)]
    """
    inner = math.prod(sizes[1:])
    if len(sizes) == 1 or begin == end:
        return [(begin, end)] if begin < end else []
    first = min(end, round_up(begin, inner))
    last = max(first, end // inner * inner)
    found: list[Span] = []
    for a, b, whole_rows in ((begin, first, False), (first, last, True), (last, end, False)):
        if a == b:
            continue
        if whole_rows:
            found.append((a, b))
            continue
        base = a // inner * inner
        found += [(base + x, base + y) for x, y in slabs(sizes[1:], a - base, b - base)]
    return found


def _slab_spans(sizes: tuple[int, ...], begin: int, end: int) -> list[Span]:
    """Return the spans in `sizes` of the one box that rows `[begin, end)` make.

    Raises:
        ValueError: if the rows make more than one box.
    """
    if len(slabs(sizes, begin, end)) != 1:
        raise ValueError(f"rows {begin} to {end} of {sizes} are not one box")
    spans: list[Span] = []
    for number in range(len(sizes)):
        inner = math.prod(sizes[number + 1 :])
        first, last = begin // inner, -(-end // inner)
        spans.append((first, last))
        begin, end = begin - first * inner, end - first * inner
        if last - first > 1:  # whole from here on
            return spans + [(0, size) for size in sizes[number + 1 :]]
    return spans


def whole(hf_name: str, parameter: str, shape: tuple[int, ...]) -> Region:
    """Return the region of a parameter that is one whole Hugging Face tensor (norms, router)."""
    return Region(hf_name, (0,) * len(shape), shape, parameter, shape, tuple((0, n) for n in shape))


def split(hf_name: str, parameter: str, shape: tuple[int, ...], dim: int, rank: int) -> Region:
    """Return the region of a parameter that is the `rank`-th equal slice along `dim`.

    Args:
        shape: shape of the local parameter.
    """
    start = tuple(rank * shape[dim] if d == dim else 0 for d in range(len(shape)))
    return Region(hf_name, start, shape, parameter, shape, tuple((0, n) for n in shape))


def rows(
    hf_name: str,
    parameter: str,
    shape: tuple[int, ...],
    local: Span,
    hf_start: int,
) -> Region:
    """Return the region of rows `local` of a parameter, which start at the tensor's row `hf_start`.

    A row may have any number of dimensions; a row of a bias has none.
    """
    inner = shape[1:]
    return Region(
        hf_name,
        (hf_start, *(0 for _ in inner)),
        (local[1] - local[0], *inner),
        parameter,
        shape,
        (local, *((0, n) for n in inner)),
    )


def uncovered(regions: Iterable[Region], hf_shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """List the tensors that the regions of all ranks do not cover, or that the model lacks.

    Counts elements over distinct boxes per tensor. That suffices if all boxes of a tensor come
    from one grid, as with tensor, pipeline and expert parallelism.
    """
    boxes: dict[str, set[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for region in regions:
        boxes.setdefault(region.hf_name, set()).add((region.start, region.shape))
    problems = [f"{name}: not a tensor of this model" for name in boxes if name not in hf_shapes]
    for name, shape in hf_shapes.items():
        covered = sum(math.prod(box) for _, box in boxes.get(name, set()))
        if covered != math.prod(shape):
            problems.append(f"{name}: {covered} of {math.prod(shape)} elements covered")
    return problems


@dataclass(frozen=True)
class Box:
    """A box of a tensor: its first element and its size, per dimension."""

    start: tuple[int, ...]
    shape: tuple[int, ...]


def overlap(a: Box, b: Box) -> Box | None:
    """Return the intersection of two boxes, or None if it is empty."""
    start = tuple(map(max, a.start, b.start))
    end = tuple(
        min(x + n, y + m) for x, n, y, m in zip(a.start, a.shape, b.start, b.shape, strict=True)
    )
    if any(low >= high for low, high in zip(start, end, strict=True)):
        return None
    return Box(start, tuple(high - low for low, high in zip(start, end, strict=True)))


def not_once(whole: Box, parts: Sequence[Box]) -> str:
    """Say how much of a box its parts cover; return "" if they cover each element exactly once."""
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
