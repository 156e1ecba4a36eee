"""Import and export: one Hugging Face tensor after another, in row blocks, into a new folder.

Everything is written into a partial folder (`new_folder.py`), the manifest last.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron_precision.checkpoint import manifest
from megatron_precision.checkpoint.manifest import SIDECAR, copy_sidecar, state_dtype
from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.schema import ParallelConfig
from megatron_precision.layouts.megatron_checkpoint import Slot, row_runs, slots
from tools.checkpoint_convert.blocks import Scratch, Source, TensorInfo
from tools.checkpoint_convert.new_folder import new_folder
from tools.checkpoint_convert.safetensors_folder import (
    SHARD_BYTES,
    SafetensorsWriter,
)
from tools.checkpoint_convert.source import BlockHash, checked_blocks, open_source
from tools.checkpoint_convert.torch_dist_writer import (
    TorchDistWriter,
    Written,
    file_spans,
    finish,
    refuse_layout,
    shards,
)
from tools.checkpoint_convert.verify import Loss, cast
from tools.checkpoint_convert.workers import Progress, run_tasks


@dataclass
class Part:
    """What one worker made.

    Attributes:
        hashes: Hugging Face name → SHA-256 of its bytes as written.
        losses: of every tensor that was cast.
        written: boxes in `.distcp` files; none for an export.
    """

    hashes: dict[str, str] = field(default_factory=dict)
    losses: dict[str, Loss] = field(default_factory=dict)
    written: list[Written] = field(default_factory=list)


class Reader:
    """Blocks of a source in the wanted dtype, hashed as they will be written."""

    def __init__(self, source: Source, dtype: torch.dtype | None, part: Part, progress: Progress):
        self._source, self._dtype, self._part, self._progress = source, dtype, part, progress
        self._casted = Scratch()

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Row blocks of a Hugging Face tensor; each is overwritten by the next."""
        digest, dtype = BlockHash(), self._dtype or self._source.tensors[name].dtype
        if self._dtype is not None:
            self._part.losses[name] = Loss()
        if dtype == self._source.tensors[name].dtype:  # what is read is what will be written
            for block in checked_blocks(self._source, name, digest):
                self._progress(block.nbytes)
                yield block
        else:
            for block in checked_blocks(self._source, name):
                self._progress(block.nbytes)
                result = self._casted.take(tuple(block.shape), dtype)
                cast(block, result, self._part.losses[name])
                digest.add(result)
                yield result
                digest.wait()
        self._part.hashes[name] = digest.hexdigest()


@dataclass(frozen=True)
class ImportTask:
    """Some slots of a Megatron checkpoint, into one file.

    Attributes:
        first, last: `[first, last)` of `slots(model)`.
    """

    source: Path
    folder: Path
    number: int
    first: int
    last: int
    dtype: torch.dtype | None
    tp_size: int
    etp_size: int

    def run(self, progress: Progress) -> Part:
        """Write the file."""
        part, source = Part(), open_source(self.source)
        reader = Reader(source, self.dtype, part, progress)
        writer = TorchDistWriter(self.folder, self.number)
        fused = Scratch()
        for slot in slots(source.model)[self.first : self.last]:
            size = self.etp_size if len(slot.index) == 2 else self.tp_size
            for row, rows in _slot_rows(slot, reader, source, self.dtype, fused):
                # Any layout loads from any cut; ranks of this one read nothing but their own.
                for start, box in shards(slot, row, rows, size):
                    writer.write(slot, start, box)
            writer.write_extra_states(slot)
        part.written = writer.close()
        return part


def _slot_rows(
    slot: Slot, reader: Reader, source: Source, dtype: torch.dtype | None, fused: Scratch
) -> Iterator[tuple[int, torch.Tensor]]:
    """(first row, rows) of a slot, in blocks; Q, K and V, which interleave, in one."""
    runs = {region.hf_name: row_runs(slot, region) for region in slot.regions}
    whole = None
    if any(len(found) > 1 for found in runs.values()):
        stored = source.tensors[slot.regions[0].hf_name].dtype
        whole = fused.take(slot.shape, dtype or stored)
    for name, found in runs.items():
        row = 0
        for block in reader.blocks(name):
            for run in found:
                part = run.within(row, row + block.shape[0])
                if part is None:
                    continue
                rows = block[part.hf_row - row : part.hf_row - row + part.rows]
                if whole is None:
                    yield part.slot_row, rows
                else:
                    whole[part.slot_row : part.slot_row + part.rows] = rows
            row += block.shape[0]
    if whole is not None:
        yield 0, whole


@dataclass(frozen=True)
class ExportTask:
    """Some shards of a Hugging Face checkpoint."""

    source: Path
    config: Path | None
    writer: SafetensorsWriter
    shards: tuple[int, ...]
    dtype: torch.dtype | None

    def run(self, progress: Progress) -> Part:
        """Write the shards."""
        part = Part()
        reader = Reader(open_source(self.source, self.config), self.dtype, part, progress)
        for shard in self.shards:
            names = self.writer.shards[shard]
            blocks = ((name, block) for name in names for block in reader.blocks(name))
            self.writer.write_shard(shard, blocks)
        return part


def _joined(parts: Sequence[Part]) -> Part:
    whole = Part()
    for part in parts:
        whole.hashes |= part.hashes
        whole.losses |= part.losses
        whole.written += part.written
    return whole


def import_checkpoint(
    source_path: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    allow_overflow: bool = False,
    progress: Progress = lambda _bytes: None,
    layout: ParallelConfig | None = None,
    workers: int = 1,
) -> Part:
    """Hugging Face to Megatron.

    Args:
        dtype: of every tensor; by default each keeps its own.
        layout: whose TP, PP, EP and ETP the files are cut for; any other loads them too.
        workers: processes that write at once.
        allow_overflow: clamp what the dtype cannot hold, rather than refuse.
        progress: told the bytes of every block that was read.

    Raises:
        UserError: for a source that is not whole, a target that exists, too little room, and
            overflows that were not allowed; nothing is left behind.
    """
    source = open_source(source_path)
    layout = layout or ParallelConfig(1, tp_size=1, rollout_tp_size=1)
    refuse_layout(source.model, layout)
    dtypes = _stacked_dtypes(source, dtype)
    with new_folder(source_path, target, _bytes(source, dtype)) as folder:
        tasks = [
            ImportTask(source_path, folder, number, *span, dtype, layout.tp_size, layout.etp_size)
            for number, span in enumerate(file_spans(source, layout, workers))
        ]
        part = _joined(run_tasks(tasks, workers, progress))
        refuse_overflows(part, allow_overflow)
        finish(folder, part.written, dtypes, source.model)
        (folder / SIDECAR).mkdir()
        copy_sidecar(source.sidecar, folder / SIDECAR)
        state_dtype(folder / SIDECAR / "config.json", dtypes.values())
        manifest.made(part.hashes, folder).write(folder)
    return part


def export_checkpoint(
    source_path: Path,
    target: Path,
    dtype: torch.dtype | None = None,
    allow_overflow: bool = False,
    progress: Progress = lambda _bytes: None,
    config: Path | None = None,
    workers: int = 1,
) -> Part:
    """Megatron to Hugging Face; arguments and errors as `import_checkpoint`'s.

    Args:
        config: a Hugging Face folder with the configuration, for a checkpoint without one.
    """
    source = open_source(source_path, config)
    tensors = {
        name: TensorInfo(info.shape, dtype or info.dtype) for name, info in source.tensors.items()
    }
    with new_folder(source_path, target, _bytes(source, dtype)) as folder:
        # A worker writes whole shards: several of them want several.
        size = sum(info.bytes for info in tensors.values())
        writer = SafetensorsWriter(folder, tensors, min(SHARD_BYTES, size // workers + 1))
        tasks = [
            ExportTask(source_path, config, writer, (shard,), dtype)
            for shard in range(len(writer.shards))
        ]
        part = _joined(run_tasks(tasks, workers, progress))
        refuse_overflows(part, allow_overflow)
        writer.write_index()
        copy_sidecar(source.sidecar, folder)
        state_dtype(folder / "config.json", (info.dtype for info in tensors.values()))
        manifest.made(part.hashes, folder).write(folder)
    return part


def refuse_overflows(part: Part, allowed: bool) -> None:
    """Raise a UserError that names every tensor with an overflow, unless they are allowed."""
    found = {name: loss for name, loss in part.losses.items() if loss.overflowed}
    if found and not allowed:
        raise UserError(
            Problem(
                what="values that the dtype cannot hold",
                where=name,
                got=f"{loss.overflowed} of {loss.elements} beyond its largest number",
                expected="none",
                remedy="--allow-overflow clamps them",
            )
            for name, loss in found.items()
        )


def _bytes(source: Source, dtype: torch.dtype | None) -> int:
    return sum(
        torch.Size(info.shape).numel() * (dtype or info.dtype).itemsize
        for info in source.tensors.values()
    )


def _stacked_dtypes(source: Source, dtype: torch.dtype | None) -> dict[str, torch.dtype]:
    """The dtype of each Megatron tensor: one for all layers and all that is fused into it.

    Raises:
        UserError: where the parts of one differ, and no dtype was asked for.
    """
    found: dict[str, set[torch.dtype]] = {}
    for slot in slots(source.model):
        names = [region.hf_name for region in slot.regions]
        found.setdefault(slot.key, set()).update(dtype or source.tensors[n].dtype for n in names)
    mixed = {key: kinds for key, kinds in found.items() if len(kinds) > 1}
    if mixed:
        raise UserError(
            Problem(
                what="Megatron stores these tensors in one dtype",
                where=f"{source.path}: {key}",
                got=", ".join(sorted(map(str, kinds))),
                expected="one dtype over all layers",
                remedy="--dtype, for example --dtype fp32, which loses nothing",
            )
            for key, kinds in mixed.items()
        )
    return {key: next(iter(kinds)) for key, kinds in found.items()}
