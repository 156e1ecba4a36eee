"""Compares two checkpoints of either format exactly, and measures what casting a tensor loses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.schema import ModelConfig
from tools.checkpoint_convert.blocks import Scratch, Source
from tools.checkpoint_convert.source import checked_blocks, open_source

# Work in slices: a cast goes through FP64, eight bytes an element.
_SLICE = 2**20


@dataclass
class Loss:
    """What a cast did to one tensor.

    Attributes:
        elements: of the tensor.
        nonfinite: elements that are infinite or nan; a cast keeps them.
        changed: elements that the new dtype does not hold exactly.
        overflowed: finite elements beyond its largest number.
        zeroed: elements that became zero and were not.
        subnormal: elements that became subnormal, with fewer bits than the dtype promises.
        relative_error: the largest of the elements that did not overflow, relative to their value.
    """

    elements: int = 0
    nonfinite: int = 0
    changed: int = 0
    overflowed: int = 0
    zeroed: int = 0
    subnormal: int = 0
    relative_error: float = 0.0

    @property
    def any(self) -> bool:
        """Whether anything was lost."""
        return self.changed > 0


def cast(block: torch.Tensor, result: torch.Tensor, loss: Loss) -> None:
    """Put `block` into `result`, rounded to nearest even; overflows are clamped to its largest.

    Args:
        block, result: contiguous, of one shape.
        loss: what was lost is added to it.
    """
    for before, after in zip(
        block.view(-1).split(_SLICE), result.view(-1).split(_SLICE), strict=True
    ):
        _cast_slice(before, after, loss)


def _cast_slice(before: torch.Tensor, after: torch.Tensor, loss: Loss) -> None:
    limits = torch.finfo(after.dtype)
    wide = before.double()
    twice = before.dtype == torch.float64 and after.dtype.itemsize == 2  # torch goes through FP32
    after.copy_(_sticky(before) if twice else before)
    finite = wide.isfinite()
    overflowed = after.isinf() & finite
    if overflowed.any():
        after[overflowed] = (wide[overflowed].sign() * limits.max).to(after.dtype)
    narrow = after.double()
    changed = (narrow != wide) & ~wide.isnan()
    loss.elements += before.numel()
    loss.nonfinite += before.numel() - int(finite.sum())
    loss.overflowed += int(overflowed.sum())
    loss.changed += int(changed.sum())
    loss.zeroed += int(((narrow == 0) & (wide != 0)).sum())
    loss.subnormal += int(((narrow != 0) & (narrow.abs() < limits.tiny)).sum())
    exact = changed & ~overflowed
    if exact.any():
        error = (narrow - wide).abs()[exact] / wide[exact].abs()
        loss.relative_error = max(loss.relative_error, float(error.max()))


def _sticky(wide: torch.Tensor) -> torch.Tensor:
    """FP64 as FP32 rounded to odd: rounding that again gives what rounding once would.

    Source: Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms
    using rounding to odd" (2008).
    """
    near = wide.float()
    bits = near.view(torch.int32)
    beyond = near.double().abs() > wide.abs()  # rounded away from zero: one step back
    inexact = (near.double() != wide) & ~wide.isnan()
    return torch.where(inexact, (bits - beyond.int()) | 1, bits).view(torch.float32)


@dataclass(frozen=True)
class Difference:
    """Something that is not the same in both.

    Attributes:
        name: of the Hugging Face tensor, or of the configuration's field.
        what: missing, of another shape or dtype, or how many elements differ, where first, and by
            how much at most.
    """

    name: str
    what: str

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"


@dataclass(frozen=True)
class Comparison:
    """What `compare` found.

    Attributes:
        compared: tensors that both have.
        differences: of the configuration first, then of the tensors.
        damaged: tensors that could not be read as they were written.
    """

    compared: int
    differences: list[Difference]
    damaged: list[Problem]


def compare(
    first: Path,
    second: Path,
    config: Path | None = None,
    dtype: torch.dtype | None = None,
    progress: Callable[[int], None] = lambda _bytes: None,
) -> Comparison:
    """Compare the models' configurations and all tensors of two checkpoints, bit for bit.

    Args:
        config: a Hugging Face folder for a Megatron checkpoint that carries no configuration.
        dtype: compare what both are in this dtype, as a conversion with it would write them.

    Raises:
        UserError: where a checkpoint cannot be opened.
    """
    a, b = open_source(first, config), open_source(second, config)
    found = [
        Difference(f"config.json: {name}", f"{left!r} against {right!r}")
        for name, left, right in _fields(a.model, b.model)
    ]
    found += [
        Difference(name, f"only in {first if name in a.tensors else second}")
        for name in sorted(a.tensors.keys() ^ b.tensors.keys())
    ]
    damaged: list[Problem] = []
    common = [name for name in a.tensors if name in b.tensors]
    for name in common:
        try:
            found += _compare_tensor(a, b, name, dtype)
        except UserError as wrong:  # named, and the other tensors are still compared
            damaged += wrong.problems
        progress(a.tensors[name].bytes)
    return Comparison(len(common), found, damaged)


def _fields(a: ModelConfig, b: ModelConfig) -> Iterator[tuple[str, object, object]]:
    """What the configurations say of the model, where they differ."""
    for field in dataclasses.fields(ModelConfig):
        left, right = getattr(a, field.name), getattr(b, field.name)
        if left != right:
            yield field.name, left, right


def _compare_tensor(
    a: Source, b: Source, name: str, dtype: torch.dtype | None
) -> Iterator[Difference]:
    left, right = a.tensors[name], b.tensors[name]
    if left.shape != right.shape or (dtype is None and left.dtype != right.dtype):
        yield Difference(
            name, f"{left.dtype} {list(left.shape)} against {right.dtype} {list(right.shape)}"
        )
        return
    row = differing = 0
    index: list[int] | None = None
    largest = 0.0
    pairs = _equal_blocks(_in_dtype(a, name, dtype), _in_dtype(b, name, dtype))
    for x, y in pairs:
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


def _in_dtype(source: Source, name: str, dtype: torch.dtype | None) -> Iterator[torch.Tensor]:
    """Row blocks, cast where a dtype is asked for; each is overwritten by the next."""
    scratch = Scratch()
    for block in checked_blocks(source, name):
        if dtype in (None, block.dtype):
            yield block
        else:
            assert dtype is not None
            result = scratch.take(tuple(block.shape), dtype)
            cast(block, result, Loss())
            yield result


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
