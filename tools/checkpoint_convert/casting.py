"""Changing a dtype, and saying what it cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch

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
