"""Writes Megatron's `torch_dist` folders without Megatron and without a process group.

A layout decides how the tensors are cut into parts, and the parts into files. Any layout can load
any cut; the ranks of the layout that it was made for read nothing but their own parts.

Each part is an archive as `torch.save` makes it. The archive of each shape is made once, around
space for the elements (`skip_data`), and the elements are written between its head and its tail as
they arrive: `torch.save` itself copies them, and computes a checksum that `torch.load` never reads.
"""

from __future__ import annotations

import functools
import io
import json
import os
import pickle
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.schema import ModelConfig, ParallelConfig
from megatron_precision.layouts.megatron_checkpoint import Slot, slots
from tools.checkpoint_convert.blocks import Scratch, Source, raw_bytes
from tools.checkpoint_convert.folders import METADATA, below_one

FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


@dataclass(frozen=True)
class Written:
    """A box in a file, as `.metadata` records it. `offset` is None for an object's bytes."""

    key: str
    offset: tuple[int, ...] | None
    shape: tuple[int, ...]
    file: str
    begin: int
    length: int


class TorchDistWriter:
    """Writes boxes into one `.distcp` file; `finish` makes a folder of several files' boxes."""

    def __init__(self, folder: Path, number: int) -> None:
        self._name = f"__{number}_0.distcp"
        self._file: BinaryIO = open(folder / self._name, "wb")  # noqa: SIM115 closed by close()
        self.written: list[Written] = []
        self._columns = Scratch()

    def write(self, slot: Slot, start: tuple[int, ...], box: torch.Tensor) -> None:
        """Write a box of a slot; `start` is in the slot's own coordinates."""
        if not box.is_contiguous():
            columns = self._columns.take(tuple(box.shape), box.dtype)
            box = columns.copy_(box)
        shape = (*(1 for _ in slot.index), *box.shape)
        head, tail = archive_around(shape, box.dtype)
        begin = self._file.tell()
        for data in (head, raw_bytes(box), tail):
            self._file.write(data)
        self._note(slot.key, (*slot.index, *start), shape, begin)

    def write_extra_states(self, slot: Slot) -> None:
        """Write the empty states that a slot's modules ask for when they load."""
        for key in slot.extra_states:
            begin = self._file.tell()
            torch.save([None], self._file)
            self._note(key, None, (), begin)

    def _note(
        self, key: str, offset: tuple[int, ...] | None, shape: tuple[int, ...], begin: int
    ) -> None:
        length = self._file.tell() - begin
        self.written.append(Written(key, offset, shape, self._name, begin, length))

    def close(self) -> list[Written]:
        """Put everything on disk; returns what was written."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self.written


@functools.lru_cache(maxsize=64)
def archive_around(shape: tuple[int, ...], dtype: torch.dtype) -> tuple[bytes, bytes]:
    """What `torch.save` writes before and after the elements of a contiguous tensor."""
    archive = io.BytesIO()
    with torch.serialization.skip_data():
        torch.save(torch.empty(shape, dtype=dtype), archive)
    archive.seek(0)
    storage = torch.load(archive, map_location="meta", weights_only=True).untyped_storage()
    begin = storage._checkpoint_offset
    whole = archive.getbuffer()
    return bytes(whole[:begin]), bytes(whole[begin + storage.nbytes() :])


def finish(
    folder: Path, written: list[Written], dtypes: Mapping[str, torch.dtype], model: ModelConfig
) -> None:
    """Write `.metadata`, `metadata.json` and `common.pt` over the boxes of all files."""
    tensors: dict[str, Any] = {}
    for slot in slots(model):
        if slot.key not in tensors:
            tensors[slot.key] = TensorStorageMetadata(
                TensorProperties(dtype=dtypes[slot.key]), torch.Size(slot.global_shape), []
            )
    storage: dict[MetadataIndex, _StorageInfo] = {}
    for box in written:
        at = _StorageInfo(box.file, box.begin, box.length)
        if box.offset is None:
            tensors[box.key] = BytesStorageMetadata()
            storage[MetadataIndex(box.key)] = at
            continue
        offset = torch.Size(box.offset)
        tensors[box.key].chunks.append(ChunkStorageMetadata(offset, torch.Size(box.shape)))
        storage[MetadataIndex(box.key, offset)] = at
    metadata = Metadata(
        state_dict_metadata=tensors,
        storage_data=storage,
        storage_meta=StorageMeta(save_id=str(uuid.uuid4())),
    )
    with open(folder / METADATA, "wb") as file:
        pickle.dump(metadata, file)
    torch.save({}, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(FORMAT), encoding="utf-8")


def shards(
    slot: Slot, row: int, rows: torch.Tensor, size: int
) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """(start, box) of every part of `rows`, which begin at `row` of the slot.

    Args:
        size: tensor-parallel ranks that divide the slot.
    """
    linear = slot.key.rpartition(".")[0].rpartition(".")[2]
    if linear in ("linear_proj", "linear_fc2") and rows.ndim == 2:
        width = rows.shape[1] // size
        for column in range(0, rows.shape[1], width):
            yield (row, column), rows[:, column : column + width]
        return
    # [gate | up] of a rank are two runs of rows.
    cuts = {"linear_fc1": 2 * size, "linear_qkv": size}.get(linear, 1)
    if slot.key.endswith("layer_norm_weight"):
        cuts = 1
    height, begin = slot.shape[0] // cuts, 0
    while begin < rows.shape[0]:
        end = min(begin + height - (row + begin) % height, rows.shape[0])
        yield (row + begin, *(0 for _ in rows.shape[1:])), rows[begin:end]
        begin = end


def refuse_layout(model: ModelConfig, layout: ParallelConfig) -> None:
    """Raise a UserError that lists every size below 1, and all that the layout does not divide."""
    ranks = {name: getattr(layout, f"{name}_size") for name in ("tp", "pp", "ep", "etp")}
    problems = below_one(ranks)
    sizes = [
        ("tp", layout.tp_size, "KV heads", model.num_key_value_heads),
        ("pp", layout.pp_size, "layers", model.num_hidden_layers),
    ]
    if model.num_experts:
        sizes += [
            ("ep", layout.ep_size, "experts", model.num_experts),
            ("etp", layout.etp_size, "the experts' MLP", model.moe_intermediate_size),
        ]
    else:
        sizes.append(("tp", layout.tp_size, "the MLP", model.intermediate_size))
    problems += [
        Problem(
            f"--{option} does not divide {what}",
            f"--{option}",
            f"{count} / {size}",
            f"a divisor of {count}",
        )
        for option, size, what, count in sizes
        if size >= 1 and count % size
    ]
    if not model.num_experts and layout.ep_size * layout.etp_size != 1:
        problems.append(Problem("a dense model has no experts", "--ep, --etp", "more than 1", "1"))
    if problems:
        raise UserError(problems)


def file_spans(source: Source, layout: ParallelConfig, workers: int) -> list[tuple[int, int]]:
    """`[first, last)` slots of each file: cut at pipeline stages and expert ranks, then evenly."""
    found = slots(source.model)
    stage = source.model.num_hidden_layers // layout.pp_size
    experts = max(1, source.model.num_experts // layout.ep_size)
    sizes = [sum(source.tensors[p.hf_name].bytes for p in slot.regions) for slot in found]
    limit = sum(sizes) // workers + 1
    spans, first, filled = [], 0, 0
    group: tuple[int, int] | None = None
    for number, slot in enumerate(found):
        at = (slot.index[0] // stage if slot.index else -1,
              slot.index[1] // experts if len(slot.index) == 2 else -1)  # fmt: skip
        moved = layout.pp_size > 1 and at[0] >= 0 and group is not None and at[0] != group[0]
        moved |= layout.ep_size > 1 and group is not None and at[1] != group[1]
        if number > first and (moved or filled + sizes[number] > limit):
            spans.append((first, number))
            first, filled = number, 0
        group, filled = at, filled + sizes[number]
    return [*spans, (first, len(found))]
