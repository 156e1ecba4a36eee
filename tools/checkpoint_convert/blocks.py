"""Tensors of a checkpoint in row blocks: what a folder of either format gives.

A tensor comes in row blocks of at most `BLOCK_BYTES`, in order. A block lives until the source is
asked for the next: its memory is used again.
"""

from __future__ import annotations

import dataclasses
import io
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_precision.checkpoint.manifest import Manifest
from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.schema import ModelConfig

BLOCK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class TensorInfo:
    """A tensor on disk."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        """Stored bytes."""
        return math.prod(self.shape) * int(self.dtype.itemsize)


class Scratch:
    """Memory that is used again and again: fresh pages cost more than the bytes put into them."""

    def __init__(self) -> None:
        self._bytes = torch.empty(0, dtype=torch.uint8)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor, in the place of the one that was taken before."""
        size = math.prod(shape) * dtype.itemsize
        if self._bytes.numel() < size:
            self._bytes = torch.empty(0, dtype=torch.uint8)  # the old goes before the new comes
            self._bytes = torch.empty(size, dtype=torch.uint8)
        return self._bytes[:size].view(dtype).view(shape)


class Source(Protocol):
    """A checkpoint of either format.

    Attributes:
        path: its folder.
        model: what its configuration says.
        sidecar: the folder that holds config, tokenizer and chat template.
        tensors: Hugging Face names, in the order in which they are cheapest to read.
        manifest: of the folder, where it has one.
    """

    path: Path
    model: ModelConfig
    sidecar: Path
    tensors: dict[str, TensorInfo]
    manifest: Manifest | None

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Row blocks of a tensor, unchecked, each in the last one's place; use `checked_blocks`."""
        ...


def counted(
    model: ModelConfig, layers: int, experts: int, config: Path
) -> tuple[ModelConfig, list[Problem]]:
    """The model with the layers and experts that a checkpoint shows, and where those are others.

    Asked before tensors are enumerated by a configuration, whose numbers may be any.

    Args:
        layers, experts: what the tensors show; 0 where they show none.
        config: the file that says the model's.
    """
    shown = {"num_hidden_layers": layers}
    if model.num_experts:
        shown["num_experts"] = experts
    problems = [
        Problem(
            "the configuration and the tensors disagree", f"{config}: {name}",
            str(getattr(model, name)), f"{count}, by the tensors",
            "take the config.json that came with these weights",
        )
        for name, count in shown.items()
        if count and count != getattr(model, name)
    ]  # fmt: skip
    there: dict[str, Any] = {name: max(1, count) for name, count in shown.items()}
    return dataclasses.replace(model, **there), problems


def row_blocks(info: TensorInfo) -> Iterator[tuple[int, int]]:
    """`[begin, end)` rows of each block."""
    count = info.shape[0]
    step = max(1, BLOCK_BYTES * count // max(1, info.bytes))
    for begin in range(0, count, step):
        yield begin, min(count, begin + step)


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor of any dtype, without a copy."""
    return memoryview(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())


def read_into(file: io.FileIO, target: memoryview) -> None:
    """Fill `target` from a file that was opened without a buffer.

    Raises:
        UserError: where the file ends before that.
    """
    filled = 0
    while filled < len(target):
        count = file.readinto(target[filled:])
        if not count:
            raise UserError(Problem("a file ended early", str(file.name), "its end", "more bytes"))
        filled += count
