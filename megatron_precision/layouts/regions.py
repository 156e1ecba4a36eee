"""Regions: which box of which Hugging Face tensor a piece of a local parameter is.

A Hugging Face checkpoint is the common language of trainer and engine. Each of its tensors is a
box; a rank's parameter holds one or more sub-boxes of such tensors, each as a strided view of
the parameter. A `Region` is that statement, as plain integers: it needs neither torch nor an
engine, so that plans can be made and tested for any layout anywhere.

Shape legend: a piece's `start` and `shape` are in the coordinates of the Hugging Face tensor;
`view` and `index` say where the piece lies in the parameter.

Boxes of a tensor: what two share, and whether some make another one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

Span = tuple[int, int]


@dataclass(frozen=True)
class Region:
    """One sub-box of one Hugging Face tensor inside one local parameter.

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
        """Elements in the piece."""
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
        """Sizes of the spanned view's leading dimensions, which together are the box's rows."""
        leading = len(self.view) - (len(self.shape) - 1)
        return tuple(end - begin for begin, end in self.index[:leading])

    def position(self, number: int) -> int:
        """Where in the parameter an element of the box is, both counted in row-major order."""
        found, inner = 0, 1
        for size, (begin, end) in zip(reversed(self.view), reversed(self.index), strict=True):
            number, at = divmod(number, end - begin)
            found += (begin + at) * inner
            inner *= size
        return found

    def elements_before(self, position: int) -> int:
        """How many elements of the box come before a place in the parameter."""
        found, inner, boxed = 0, math.prod(self.view), self.numel
        for size, (begin, end) in zip(self.view, self.index, strict=True):
            inner, boxed = inner // size, boxed // (end - begin)
            at, position = divmod(position, inner)
            found += (min(max(at, begin), end) - begin) * boxed
            if not begin <= at < end:
                break
        return found

    def holds(self, start: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        """Whether a box of the Hugging Face tensor lies in the piece."""
        ends = zip(self.start, self.shape, start, shape, strict=True)
        return all(a <= b and b + m <= a + n for a, n, b, m in ends)

    def within(self, start: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
        """Indexes `view` at a smaller box of the piece, whose rows are one of its `slabs`.

        Args:
            start, shape: in the coordinates of the Hugging Face tensor.

        Raises:
            ValueError: for a box that leaves the piece, or whose rows are no slab.
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
    """The smallest multiple that is no smaller than `count`."""
    return -(-count // multiple) * multiple


def slabs(sizes: tuple[int, ...], begin: int, end: int) -> list[Span]:
    """Cut rows `[begin, end)` of dimensions `sizes`, flattened, into as few boxes as can be.

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
    """The box of `sizes` that rows `[begin, end)` are.

    Raises:
        ValueError: where they are more than one.
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
    """A parameter that is one whole Hugging Face tensor (norms, the router)."""
    return Region(hf_name, (0,) * len(shape), shape, parameter, shape, tuple((0, n) for n in shape))


def split(hf_name: str, parameter: str, shape: tuple[int, ...], dim: int, rank: int) -> Region:
    """A parameter that is the `rank`-th equal slice of a Hugging Face tensor along `dim`.

    Args:
        shape: of the local parameter.
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
    """Rows `local` of a parameter are rows of a Hugging Face tensor, from row `hf_start` on.

    Rows have any number of dimensions; those of a bias have none.
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


def uncovered(pieces: Iterable[Region], hf_shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Names what the pieces of all ranks leave uncovered or cover with a tensor that is not there.

    Counts elements per tensor over distinct boxes: enough where every box of a tensor is of the
    same grid, as tensor, pipeline and expert parallelism make them.
    """
    boxes: dict[str, set[tuple[tuple[int, ...], tuple[int, ...]]]] = {}
    for piece in pieces:
        boxes.setdefault(piece.hf_name, set()).add((piece.start, piece.shape))
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
