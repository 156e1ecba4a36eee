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
        changed: elements that the new dtype does not hold exactly.
        overflowed: finite elements beyond its largest number.
        zeroed: elements that became zero and were not.
        subnormal: elements that became subnormal, with fewer bits than the dtype promises.
        relative_error: the largest of the elements that did not overflow, relative to their value.
    """

    elements: int = 0
    changed: int = 0
    overflowed: int = 0
    zeroed: int = 0
    subnormal: int = 0
    relative_error: float = 0.0

    @property
    def any(self) -> bool:
        """Whether anything was lost."""
        return self.changed > 0


def cast(block: torch.Tensor, dtype: torch.dtype, loss: Loss) -> torch.Tensor:
    """`block` in another dtype, rounded to nearest even; overflows are clamped to its largest.

    Args:
        loss: what was lost is added to it.
    """
    loss.elements += block.numel()
    if block.dtype == dtype:
        return block
    result = torch.empty(block.shape, dtype=dtype)
    for before, after in zip(
        block.reshape(-1).split(_SLICE), result.view(-1).split(_SLICE), strict=True
    ):
        _cast_slice(before, after, loss)
    return result


def _cast_slice(before: torch.Tensor, after: torch.Tensor, loss: Loss) -> None:
    limits = torch.finfo(after.dtype)
    wide = before.double()
    after.copy_(before)
    overflowed = after.isinf() & wide.isfinite()
    if overflowed.any():
        loss.overflowed += int(overflowed.sum())
        after[overflowed] = (wide[overflowed].sign() * limits.max).to(after.dtype)
    changed = (after.double() != wide) & ~wide.isnan()
    loss.changed += int(changed.sum())
    loss.zeroed += int(((after == 0) & (wide != 0)).sum())
    loss.subnormal += int(((after != 0) & (after.abs().double() < limits.tiny)).sum())
    exact = changed & ~overflowed
    if exact.any():
        error = (after.double() - wide).abs()[exact] / wide[exact].abs()
        loss.relative_error = max(loss.relative_error, float(error.max()))
