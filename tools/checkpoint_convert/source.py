"""What every command reads: a checkpoint of either format, seen as Hugging Face tensors.

A tensor comes in row blocks of at most `BLOCK_BYTES`, in order; its bytes are checked against the
manifest when the last block has been read. A block lives until the source is asked for the next:
its memory is used again.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from pathlib import Path

import torch

from megatron_precision.config.errors import Problem, UserError
from tools.checkpoint_convert.blocks import Source, raw_bytes
from tools.checkpoint_convert.folders import is_megatron, source_problems
from tools.checkpoint_convert.safetensors_folder import SafetensorsFolder
from tools.checkpoint_convert.torch_dist_folder import TorchDistFolder


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


def open_source(path: Path, config: Path | None = None) -> Source:
    """Open a folder as what it is.

    Args:
        config: a Hugging Face folder with the configuration of a Megatron checkpoint that carries
            none.

    Raises:
        UserError: where it is neither format, or incomplete.
    """
    if problems := source_problems(path):
        raise UserError(problems)
    return TorchDistFolder(path, config) if is_megatron(path) else SafetensorsFolder(path)
