"""Proves a weight sync: compares checksums of what trainers hold with what engines read.

The trainers compute a checksum of each cell that they send or copy, after the cast to the engine's
dtype. It follows the cell's route in a message of its own, eight bytes a cell. The receiving rank
compares it with the checksum of what its engine's kernels read. A cell that was corrupted, dropped,
duplicated or sent to the wrong rank is reported by name.

A checksum is computed on bit patterns. The cell [rows, columns] is summed along rows and along
columns, as integers, and both sums are weighted by position:
Σ u_r Σ_c x_rc + Σ v_c Σ_r x_rc modulo 2^64, u odd and v even. The total weight u_r + v_c of an
element is odd, so a change of one element always changes the sum, its highest bit included. Two
elements that change places are missed with a chance of about 2^-15; rows, columns or whole regions
that change places, with about 2^-60. On the CPU both sums are computed block by block while a
block is in the cache, so memory is read once.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron_precision.sync.plan import Cell, Exchange, RankPlan
from megatron_precision.sync.transport import Views

_BLOCK_BYTES = 2 * 2**20  # a block stays in the CPU's cache for both sums
_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(view: torch.Tensor, columns: int) -> torch.Tensor:
    """Compute the checksum of a region, an int64 scalar on the view's device.

    Args:
        view: the region, in any shape that is `[rows, columns]` in row-major order; strided.
        columns: number of columns of the region.
    """
    # Words of as many bytes as the columns fill evenly, the same on both sides.
    row_bytes = columns * view.element_size()
    size = next(n for n in (8, 4, 2) if row_bytes % n == 0)
    if view.shape[-1] != columns:
        view = view.reshape(-1, columns)
    if not _viewable(view, size):
        view = view.contiguous()
    words = view.view(_INTEGERS[size])
    if words.ndim == 1:
        words = words[None]
    step = len(words)
    if view.device.type == "cpu":
        step = max(1, _BLOCK_BYTES // (size * math.prod(words.shape[1:])))
    if step >= len(words):
        by_row, by_column = _both_sums(words)
    else:
        row_sums, column_sums = zip(*map(_both_sums, words.split(step)), strict=True)
        by_row, by_column = torch.cat(row_sums), torch.stack(column_sums).sum(0)
    total = (by_row * _weights(len(by_row), 0, view.device)).sum()
    return total + (by_column * _weights(len(by_column), 1, view.device)).sum()


def _both_sums(block: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    rows = block.sum(-1, dtype=torch.int64).flatten()
    return rows, block.sum(tuple(range(block.ndim - 1)), dtype=torch.int64)


def _viewable(view: torch.Tensor, size: int) -> bool:
    ratio = size // view.element_size()
    aligned = view.storage_offset() % ratio == 0
    return aligned and view.stride(-1) == 1 and all(s % ratio == 0 for s in view.stride()[:-1])


@functools.lru_cache(maxsize=256)
def _weights(count: int, stream: int, device: torch.device) -> torch.Tensor:
    """Return pseudo-random int64 weights [count] (splitmix64): odd in stream 0, even in 1."""
    z = (torch.arange(1, count + 1, device=device) + (stream << 40)) * -0x61C8864680B583EB
    for shift, factor in ((30, -0x40A7B892E31B1A47), (27, -0x6B2FB644ECCEEE15)):
        z = (z ^ ((z >> shift) & (2 ** (64 - shift) - 1))) * factor
    z = z ^ ((z >> 31) & (2**33 - 1))
    return z | 1 if stream == 0 else z & -2


def columns_of(shape: tuple[int, ...]) -> int:
    """Return the number of columns of a cell of this shape; a vector is one row."""
    return shape[-1] if len(shape) > 1 else math.prod(shape)


class RegionProof:
    """Computes and exchanges one rank's checksums, bound to the trainer's tensors.

    Args:
        plan: this rank's whole plan, so that each peer gets one message for all layers.
        sources: the trainer's tensors on this rank.
        wire: dtype in which weights are sent.
        engine: dtype of the engine's parameters.

    Attributes:
        needed: the cells that this rank's engine receives.

    Raises:
        PlanError: if no region on this rank contains a cell of the plan.
    """

    def __init__(
        self, plan: RankPlan, sources: Views, *, wire: torch.dtype, engine: torch.dtype
    ) -> None:
        self._plan, self._wire, self._engine = plan, wire, engine
        self._held = {cell: sources.of(cell) for cell in plan.held}
        self.needed = plan.needed

    @torch.no_grad()
    def held(self) -> dict[Cell, int]:
        """Compute the checksum of each cell that this rank's trainer sends or copies."""
        if not self._held:
            return {}
        cast = ((c, view.to(self._wire).to(self._engine)) for c, view in self._held.items())
        sums = torch.stack([checksum(view, columns_of(cell.shape)) for cell, view in cast])
        return dict(zip(self._held, sums.tolist(), strict=True))

    def arrived(self, held: Mapping[Cell, int]) -> dict[Cell, int]:
        """Return the trainer's checksum of each cell that this rank needs; a collective call."""
        known = {cell: held[cell] for cell in self._plan.copies}
        known |= _exchanged(self._plan.direct, held)
        return known | _exchanged(self._plan.fan_out, known)


def _exchanged(exchange: Exchange, known: Mapping[Cell, int]) -> dict[Cell, int]:
    """Send each peer the checksums of its cells, and receive those of this rank's cells."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    buffers = {
        peer: torch.empty(len(cells), dtype=torch.int64, device=device)
        for peer, cells in exchange.receives.items()
    }
    operations = [dist.P2POp(dist.irecv, buffer, peer) for peer, buffer in buffers.items()]
    for peer, cells in exchange.sends.items():
        values = torch.tensor([known[cell] for cell in cells], dtype=torch.int64, device=device)
        operations.append(dist.P2POp(dist.isend, values, peer))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return {
        cell: value
        for peer, cells in exchange.receives.items()
        for cell, value in zip(cells, buffers[peer].tolist(), strict=True)
    }
