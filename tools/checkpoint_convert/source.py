"""What every command reads: a checkpoint of either format, seen as Hugging Face tensors.

A tensor comes in row blocks of at most `BLOCK_BYTES`, in order; its bytes are checked against the
manifest when the last block has been read. A block lives until the source is asked for the next:
its memory is used again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from megatron_precision.checkpoint.manifest import Manifest
from megatron_precision.config import ModelConfig
from megatron_precision.errors import Problem, UserError
from tools.checkpoint_convert.folders import is_megatron, source_problems

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


class BlockHash:
    """SHA-256 of a tensor's blocks, computed beside whatever else reads the same block."""

    # Below, a thread costs more than the hash.
    _THREAD_BYTES = 2**18

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._thread: threading.Thread | None = None

    def add(self, block: torch.Tensor) -> None:
        """Begin to hash a block; it may not change before `wait`."""
        self.wait()
        data = raw_bytes(block)
        if len(data) < self._THREAD_BYTES:
            self._digest.update(data)
            return
        self._thread = threading.Thread(target=self._digest.update, args=(data,))
        self._thread.start()

    def wait(self) -> None:
        """Until all blocks are hashed."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def hexdigest(self) -> str:
        """Hexadecimal, of all blocks so far."""
        self.wait()
        return self._digest.hexdigest()


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


def checked_blocks(
    source: Source, name: str, digest: BlockHash | None = None
) -> Iterator[torch.Tensor]:
    """The row blocks of a tensor, compared with the manifest's hash at the end.

    Args:
        digest: takes the blocks, for a caller who wants their hash.

    Raises:
        UserError: where the bytes are not those that were written.
    """
    if digest is None:
        if source.manifest is None or source.manifest.is_by_file:
            yield from source.blocks(name)
            return
        digest = BlockHash()
    for block in source.blocks(name):
        digest.add(block)
        yield block
        digest.wait()
    if source.manifest is None or source.manifest.is_by_file:  # its files have been checked
        return
    found, expected = digest.hexdigest(), source.manifest.hash_of(name) or "no hash"
    if found != expected:
        raise UserError(
            Problem(
                what="a tensor's bytes are not those that were written",
                where=f"{source.path}: {name}",
                got=f"sha256 {found[:16]}…",
                expected=f"sha256 {expected[:16]}… by the manifest",
                remedy="the file was damaged after it was written: convert again",
            )
        )


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


def open_source(path: Path, config: Path | None = None) -> Source:
    """Open a folder as what it is.

    Args:
        config: a Hugging Face folder with the configuration of a Megatron checkpoint that carries
            none.

    Raises:
        UserError: where it is neither format, or incomplete.
    """
    from tools.checkpoint_convert.safetensors_folder import SafetensorsFolder
    from tools.checkpoint_convert.torch_dist_folder import TorchDistFolder

    if problems := source_problems(path):
        raise UserError(problems)
    return TorchDistFolder(path, config) if is_megatron(path) else SafetensorsFolder(path)
