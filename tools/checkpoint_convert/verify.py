"""Comparing two checkpoints of either format, tensor by tensor, exactly."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_precision.errors import UserError
from tools.checkpoint_convert.source import Source, checked_blocks, open_source


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same in both.

    Attributes:
        name: of the Hugging Face tensor.
        what: missing, of another shape or dtype, or how many elements differ, where first, and by
            how much at most.
    """

    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


def compare(
    first: Path,
    second: Path,
    config: Path | None = None,
    progress: Callable[[int], None] = lambda _bytes: None,
) -> tuple[int, list[Difference]]:
    """Compare all tensors of two checkpoints, bit for bit.

    Args:
        config: a Hugging Face folder for a Megatron checkpoint that carries no configuration.

    Returns:
        Tensors that were compared, and what differs.

    Raises:
        UserError: where a checkpoint cannot be opened.
    """
    a, b = open_source(first, config), open_source(second, config)
    found = [
        Difference(name, f"only in {first if name in a.tensors else second}")
        for name in sorted(a.tensors.keys() ^ b.tensors.keys())
    ]
    common = [name for name in a.tensors if name in b.tensors]
    for name in common:
        try:
            found += _compare_tensor(a, b, name)
        except UserError as damaged:  # named, and the other tensors are still compared
            found += [Difference(name, problem.what + f" ({problem.where})")
                      for problem in damaged.problems]  # fmt: skip
        progress(a.tensors[name].bytes)
    return len(common), found


def _compare_tensor(a: Source, b: Source, name: str) -> Iterator[Difference]:
    left, right = a.tensors[name], b.tensors[name]
    if left != right:
        yield Difference(
            name, f"{left.dtype} {list(left.shape)} against {right.dtype} {list(right.shape)}"
        )
        return
    row = differing = 0
    index: list[int] | None = None
    largest = 0.0
    for x, y in _equal_blocks(checked_blocks(a, name), checked_blocks(b, name)):
        if not torch.equal(bits(x), bits(y)):
            wrong = bits(x) != bits(y)
            differing += int(wrong.sum())
            if index is None:
                at = wrong.nonzero()[0].tolist()
                index = [row + at[0], *at[1:]]
            gap = (x.double() - y.double()).abs()[wrong].nan_to_num(nan=float("inf"))
            largest = max(largest, float(gap.max()))
        row += x.shape[0]
    if differing:
        yield Difference(
            name,
            f"{differing} of {torch.Size(left.shape).numel()} elements differ, the first at "
            f"{index}, by {largest:.6g} at most",
        )


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor as integers of the same width: -0 is not 0, and a nan is itself."""
    width = {2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.dtype.itemsize]
    return tensor.contiguous().view(width)


def _equal_blocks(
    first: Iterator[torch.Tensor], second: Iterator[torch.Tensor]
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Pairs of blocks with the same rows: the formats may cut a tensor differently."""
    x = y = None
    while True:
        x = next(first, None) if x is None or not x.shape[0] else x
        y = next(second, None) if y is None or not y.shape[0] else y
        if x is None and y is None:
            return
        assert x is not None, "equal shapes give equal rows"
        assert y is not None, "equal shapes give equal rows"
        rows = min(x.shape[0], y.shape[0])
        yield x[:rows], y[:rows]
        x, y = x[rows:], y[rows:]
