"""Megatron's `torch_dist` folders, read and written without Megatron and without a process group.

`.metadata` says which boxes of which tensors lie where in the `.distcp` files; each box is one
`torch.save`. `.metadata` is a pickle: it is read with the few classes that PyTorch writes into
it, and nothing else is ever unpickled (`weights_only`).

Checkpoints of a trainer may hold more (optimizer, random state); only the model is read.
"""

from __future__ import annotations

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

from megatron_precision.config import ModelConfig
from megatron_precision.errors import Problem, UserError
from megatron_precision.weights.hf_config import read_model
from megatron_precision.weights.megatron_checkpoint import ALIASES, Slot, slots
from tools.checkpoint_convert import manifest
from tools.checkpoint_convert.source import TensorInfo, row_blocks

METADATA = ".metadata"
# Config, tokenizer and chat template of the Hugging Face folder, carried along unchanged.
SIDECAR = "huggingface"
FORMAT = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_CHECKPOINT = "torch.distributed.checkpoint"
_ALLOWED = {
    (f"{_CHECKPOINT}.metadata", name)
    for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "BytesStorageMetadata", "ChunkStorageMetadata", "_MEM_FORMAT_ENCODING",
    )
} | {
    (f"{_CHECKPOINT}.planner", name)
    for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")
} | {
    (f"{_CHECKPOINT}.filesystem", "_StorageInfo"),
    (f"{_CHECKPOINT}.filesystem", "_StoragePrefix"),
    ("torch", "Size"),
    ("torch", "device"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
}  # fmt: skip


@dataclass(frozen=True)
class Written:
    """A box in a file, as `.metadata` records it. `offset` is None for an object's bytes."""

    key: str
    offset: tuple[int, ...] | None
    shape: tuple[int, ...]
    file: str
    begin: int
    length: int


class TorchDistFolder:
    """A `torch_dist` folder as a `Source`.

    Raises:
        UserError: lists every file that is missing or cut short, and every tensor that is missing
            or of another shape than the configuration says.
    """

    def __init__(self, path: Path, config: Path | None = None) -> None:
        self.path = path
        self.sidecar = config or path / SIDECAR
        self.model = read_model(self.sidecar / "config.json")
        self.manifest = manifest.read(path)
        self._metadata = _read_metadata(path)
        self._slots = {
            piece.hf_name: (slot, piece) for slot in slots(self.model) for piece in slot.pieces
        }
        problems = [*self._missing_files(), *self._differences()]
        if problems:
            raise UserError(problems)
        self.tensors = {
            name: TensorInfo(piece.shape, self._stored(slot.key)[1].properties.dtype)
            for name, (slot, piece) in self._slots.items()
        }
        self._last_chunk: tuple[object, torch.Tensor] | None = None
        self._last_slot: tuple[object, torch.Tensor] | None = None

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Row blocks of a Hugging Face tensor."""
        slot, piece = self._slots[name]
        if len(slot.pieces) == 1:  # rows of the one are rows of the other
            inner = slot.shape[1:]
            for begin, end in row_blocks(self.tensors[name]):
                start, shape = (begin, *(0 for _ in inner)), (end - begin, *inner)
                yield self._read_box(slot, start, shape)
            return
        if self._last_slot is None or self._last_slot[0] is not slot:
            self._last_slot = None  # the old one goes before the new one comes
            whole = self._read_box(slot, (0,) * len(slot.shape), slot.shape)
            self._last_slot = (slot, whole)
        view = self._last_slot[1].view(piece.view)[piece.spans]
        yield view.reshape(piece.shape)

    def _stored(self, key: str) -> tuple[str, Any]:
        """(name, metadata) of a tensor, by either name."""
        known = self._metadata.state_dict_metadata
        name = key if key in known else ALIASES.get(key, key)
        return name, known.get(name)

    def _read_box(self, slot: Slot, start: tuple[int, ...], shape: tuple[int, ...]) -> torch.Tensor:
        """A box of a slot, put together from the chunks that overlap it."""
        name, stored = self._stored(slot.key)
        box = torch.empty(shape, dtype=stored.properties.dtype)
        low = (*slot.index, *start)
        high = (*(i + 1 for i in slot.index), *(a + n for a, n in zip(start, shape, strict=True)))
        filled, stacked = 0, len(slot.index)
        for chunk in stored.chunks:
            begin = [max(a, b) for a, b in zip(low, chunk.offsets, strict=True)]
            end = [min(b, o + n) for b, o, n in zip(high, chunk.offsets, chunk.sizes, strict=True)]
            if any(a >= b for a, b in zip(begin, end, strict=True)):
                continue
            data = self._read_chunk(name, chunk)
            inside = tuple(
                slice(a - o, b - o) for a, b, o in zip(begin, end, chunk.offsets, strict=True)
            )
            target = tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, low, strict=True))[
                stacked:
            ]
            part = box[target]
            part.copy_(data[inside].reshape(part.shape))
            filled += part.numel()
        if filled != box.numel():
            raise UserError(
                Problem(
                    "a tensor is not covered",
                    f"{self.path}: {name} {list(slot.index)}",
                    f"{filled} of {box.numel()} elements",
                    "every element once",
                )
            )
        return box

    def _read_chunk(self, name: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        index = MetadataIndex(name, chunk.offsets)
        if self._last_chunk is not None and self._last_chunk[0] == index:
            return self._last_chunk[1]
        self._last_chunk = None
        at = self._metadata.storage_data[index]
        where = f"{self.path}/{at.relative_path}: {name} at {list(chunk.offsets)}"
        try:
            with open(self.path / at.relative_path, "rb") as file:
                file.seek(at.offset)
                saved = io.BytesIO(file.read(at.length))
            data = torch.load(saved, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as wrong:
            first = str(wrong).splitlines()[0] if str(wrong) else repr(wrong)
            raise UserError(
                Problem("a damaged tensor", where, first, "what torch.save wrote")
            ) from wrong
        if not isinstance(data, torch.Tensor) or data.shape != chunk.sizes:
            got = str(tuple(getattr(data, "shape", ())))
            raise UserError(Problem("a damaged tensor", where, got, str(tuple(chunk.sizes))))
        self._last_chunk = (index, data)
        return data

    def _missing_files(self) -> Iterator[Problem]:
        ends: dict[str, int] = {}
        for at in self._metadata.storage_data.values():
            ends[at.relative_path] = max(ends.get(at.relative_path, 0), at.offset + at.length)
        for name, end in sorted(ends.items()):
            file = self.path / name
            if not file.is_file():
                yield Problem("a file is missing", str(file), "no file", f"{end} bytes")
            elif file.stat().st_size < end:
                got = f"{file.stat().st_size} bytes"
                yield Problem("a file was cut short", str(file), got, f"{end} bytes")

    def _differences(self) -> Iterator[Problem]:
        wanted: dict[str, tuple[int, ...]] = {}
        for slot, _ in self._slots.values():
            wanted[slot.key] = slot.global_shape
        known = self._metadata.state_dict_metadata
        names = {self._stored(key)[0] for key in wanted}
        for key, shape in wanted.items():
            stored = self._stored(key)[1]
            if not isinstance(stored, TensorStorageMetadata):
                yield Problem("a missing tensor", f"{self.path}: {key}", "nothing", str(shape))
                continue
            got = tuple(stored.size)
            padded = key in ("embedding.word_embeddings.weight", "output_layer.weight")
            if got != shape and not (padded and got[0] > shape[0] and got[1:] == shape[1:]):
                yield Problem(
                    "a tensor of another shape", f"{self.path}: {key}", str(got), str(shape)
                )
        model = ("embedding.", "decoder.", "output_layer.")
        for key, stored in known.items():
            if (
                isinstance(stored, TensorStorageMetadata)
                and key.startswith(model)
                and key not in names
            ):
                yield Problem(
                    "an unexpected tensor",
                    f"{self.path}: {key}",
                    str(tuple(stored.size)),
                    f"the tensors of {self.model.model_type}, and no others",
                )


class TorchDistWriter:
    """Writes boxes into one `.distcp` file; `finish` makes a folder of several files' boxes."""

    def __init__(self, folder: Path, number: int) -> None:
        self._name = f"__{number}_0.distcp"
        self._file: BinaryIO = open(folder / self._name, "wb")  # noqa: SIM115 closed by close()
        self.written: list[Written] = []

    def write(self, slot: Slot, start: tuple[int, ...], box: torch.Tensor) -> None:
        """Write a box of a slot; `start` is in the slot's own coordinates."""
        data = box.contiguous().view((1,) * len(slot.index) + tuple(box.shape))
        self._save(slot.key, (*slot.index, *start), tuple(data.shape), data)

    def write_extra_state(self, slot: Slot) -> None:
        """Write the empty extra state that Megatron's linear layers ask for when they load."""
        prefix = slot.key.rpartition(".")[0]
        index, stack = (".".join(map(str, axes)) for axes in (slot.index, slot.stack))
        self._save(f"{prefix}._extra_state/shard_{index}_{stack}", None, (), [None])

    def _save(
        self, key: str, offset: tuple[int, ...] | None, shape: tuple[int, ...], data: object
    ) -> None:
        begin = self._file.tell()
        torch.save(data, self._file)
        length = self._file.tell() - begin
        self.written.append(Written(key, offset, shape, self._name, begin, length))

    def close(self) -> list[Written]:
        """Put everything on disk; returns what was written."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        return self.written


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


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} has no place in checkpoint metadata")


def _read_metadata(path: Path) -> Metadata:
    try:
        with open(path / METADATA, "rb") as file:
            found = _MetadataUnpickler(file).load()
        if not isinstance(found, Metadata) or found.storage_data is None:
            raise ValueError(f"a {type(found).__name__}")
    except Exception as wrong:  # a damaged pickle can raise anything
        raise UserError(
            Problem("cannot read the checkpoint's metadata", f"{path}/{METADATA}", str(wrong),
                    "what PyTorch's distributed checkpoint writes")
        ) from wrong  # fmt: skip
    return found
