"""Checksums of regions against the formula in Python's integers, and what they notice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from megatron_precision.sync import verify
from megatron_precision.sync.verify import checksum


def splitmix(count: int, stream: int) -> list[int]:
    """The published generator, started at stream · 2^40."""
    mask, found = 2**64 - 1, []
    for number in range(1, count + 1):
        z = (number + (stream << 40)) * 0x9E3779B97F4A7C15 & mask
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & mask
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB & mask
        found.append(z ^ (z >> 31))
    return found


def by_hand(values: torch.Tensor) -> int:
    """Of a [rows, columns] region whose rows are whole 64-bit words."""
    words = np.frombuffer(values.contiguous().view(torch.uint8).numpy().tobytes(), np.int64)
    rows = words.reshape(len(values), -1).tolist()
    u = [number | 1 for number in splitmix(len(rows), 0)]
    v = [number & ~1 for number in splitmix(len(rows[0]), 1)]
    total = sum(a * sum(row) for a, row in zip(u, rows, strict=True))
    total += sum(b * sum(column) for b, column in zip(v, zip(*rows, strict=True), strict=True))
    return (total + 2**63) % 2**64 - 2**63


@pytest.mark.parametrize("block_bytes", [64, 1000, 2**21])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_it_is_the_formula_whatever_the_blocks(
    dtype: torch.dtype, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "_BLOCK_BYTES", block_bytes)
    values = torch.randn(23, 24, generator=torch.Generator().manual_seed(3)).to(dtype)
    assert int(checksum(values, 24)) == by_hand(values)
    # The same region as a slice of something larger, on either side of it, and in three dimensions.
    inside = torch.zeros(30, 40, dtype=dtype)
    inside[2:25, 4:28] = values
    assert int(checksum(inside[2:25, 4:28], 24)) == by_hand(values)
    unaligned = torch.zeros(23, 27, dtype=dtype)
    unaligned[:, 1:25] = values
    assert int(checksum(unaligned[:, 1:25], 24)) == by_hand(values)
    assert int(checksum(values[:22].view(2, 11, 24), 24)) == by_hand(values[:22])


@pytest.mark.parametrize("columns", [1, 3, 6, 24])
def test_one_bit_and_changed_places_are_noticed(columns: int) -> None:
    values = torch.arange(72, dtype=torch.int32).view(-1, columns).view(torch.float32)
    whole = int(checksum(values, columns))
    for place in range(72):
        for bit in (0, 15, 31):
            flipped = values.clone()
            flipped.view(torch.int32).view(-1)[place] ^= -(2**31) if bit == 31 else 1 << bit
            assert int(checksum(flipped, columns)) != whole
    assert int(checksum(values.flip(0), columns)) != whole
    if columns > 1:
        assert int(checksum(values.flip(1), columns)) != whole
