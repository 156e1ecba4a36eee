"""The header of a safetensors file, read without the library, which maps the whole file."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path
from typing import Any

import torch

from megatron_precision.precision.dtypes import torch_dtype

DTYPES = {
    "F64": torch.float64,
    "F32": torch_dtype("fp32"),
    "F16": torch_dtype("fp16"),
    "BF16": torch_dtype("bf16"),
}
_MAX_HEADER = 100 * 2**20


class DamagedHeader(ValueError):
    """What is wrong with a file, in words for its owner."""


class OtherDtype(ValueError):
    """Tensors of a whole file that have a dtype which is not converted."""

    def __init__(self, dtypes: dict[str, str]) -> None:
        super().__init__(str(dtypes))
        self.dtypes = dtypes


def read_header(file: Path) -> list[tuple[str, torch.dtype, tuple[int, ...], int]]:
    """(name, dtype, shape, first byte in the file) of each tensor, in the file's order.

    Raises:
        DamagedHeader: where it is none, or does not account for every byte of the file.
        OtherDtype: where tensors are quantised, integers, or of another dtype than `DTYPES` has.
    """
    size = file.stat().st_size
    with open(file, "rb") as stream:
        start = stream.read(8)
        if len(start) < 8:
            raise DamagedHeader(f"a file of {size} bytes, which ends before its header")
        (length,) = struct.unpack("<Q", start)
        if length > min(_MAX_HEADER, size - 8):
            raise DamagedHeader(f"a header of {length} bytes in a file of {size}")
        text = stream.read(length)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError):
        header = None
    if not isinstance(header, dict):
        raise DamagedHeader("a header that is no JSON object")
    header.pop("__metadata__", None)
    spans = sorted((_span(name, entry), name) for name, entry in header.items())
    others = {n: e["dtype"] for n, e in header.items() if e["dtype"] not in DTYPES}
    if others:
        raise OtherDtype(others)
    first, last = 8 + length, 0
    found = []
    for (begin, end), name in spans:
        dtype, shape = DTYPES[header[name]["dtype"]], tuple(header[name]["shape"])
        held = math.prod(shape) * dtype.itemsize
        if begin != last:
            raise DamagedHeader(f"{name}: begins at {begin}, where {last} bytes are taken")
        if end - begin != held:
            raise DamagedHeader(f"{name}: {end - begin} bytes for a shape of {held}")
        last = end
        found.append((name, dtype, shape, first + begin))
    if first + last != size:
        raise DamagedHeader(f"{size} bytes, {first + last} by its header: cut short or overwritten")
    return found


def _span(name: str, entry: Any) -> tuple[int, int]:
    """`[begin, end)` of a tensor's bytes, once its entry is what the format says."""
    try:
        dtype, (begin, end) = entry["dtype"], entry["data_offsets"]
        numbers = [begin, end, *entry["shape"]]
    except (KeyError, TypeError, ValueError):
        numbers = [None]
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise DamagedHeader(f"{name}: without dtype, shape and data_offsets")
    if not isinstance(dtype, str):
        raise DamagedHeader(f"{name}: dtype {dtype!r}, which is no text")
    return begin, end
