"""Megatron's `torch_dist` folders, read without Megatron and without a process group.

`.metadata` says which boxes of which tensors lie where in the `.distcp` files; each box is one
`torch.save`. `.metadata` is a pickle: it is read with the few classes that PyTorch writes into
it, and nothing else is ever unpickled (`weights_only`).

Checkpoints of a trainer may hold more (optimizer, random state); only the model is read.
"""

from __future__ import annotations

import enum
import io
import itertools
import math
import pickle
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.utils import _create_file_view

from megatron_precision.checkpoint import manifest
from megatron_precision.checkpoint.manifest import COPY_AGAIN, SIDECAR
from megatron_precision.config.errors import Problem, UserError
from megatron_precision.layouts.hf_config import read_model
from megatron_precision.layouts.megatron_checkpoint import ALIASES, Slot, row_runs, slots
from megatron_precision.layouts.regions import round_up
from tools.checkpoint_convert.blocks import (
    Scratch,
    TensorInfo,
    counted,
    raw_bytes,
    read_into,
    row_blocks,
)
from tools.checkpoint_convert.folders import METADATA

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


_Box = tuple[tuple[int, ...], tuple[int, ...]]  # [begin, end)


@dataclass(frozen=True)
class _Place:
    """The elements of a chunk: `begin` in bytes, `first` and `strides` in elements from there."""

    file: Path
    begin: int
    first: int
    strides: tuple[int, ...]


class TorchDistFolder:
    """A `torch_dist` folder as a `Source`.

    Raises:
        UserError: lists every file that is missing or cut short, and every tensor that is missing
            or of another shape than the configuration says.
    """

    def __init__(self, path: Path, config: Path | None = None) -> None:
        self.path = path
        self.sidecar = config or path / SIDECAR
        own = path / SIDECAR / "config.json"
        if config is None and not own.is_file():
            raise UserError(
                Problem(
                    "a checkpoint without a configuration", str(own), "no file", "config.json",
                    "--config HF_DIR names a folder that has it",
                )
            )  # fmt: skip
        self.model = read_model(self.sidecar / "config.json")
        if config is not None and own.is_file() and read_model(own) != self.model:
            raise UserError(
                Problem(
                    "another configuration than the checkpoint's own", "--config", str(config),
                    f"what {own} says", "leave --config out",
                )
            )  # fmt: skip
        self.manifest = manifest.read(path)
        self._metadata = _read_metadata(path)
        shown, problems = counted(self.model, *self._counts(), self.sidecar / "config.json")
        self._slots = {
            region.hf_name: (slot, region) for slot in slots(shown) for region in slot.regions
        }
        self._chunks = self._chunks_by_slot()
        problems += [*self._missing_files(), *self._differences()]
        if problems:
            raise UserError(problems)
        self.tensors = {
            name: TensorInfo(region.shape, self._stored(slot.key)[1].properties.dtype)
            for name, (slot, region) in self._slots.items()
        }
        self._places: dict[MetadataIndex, _Place] = {}
        self._block, self._run = Scratch(), Scratch()

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Row blocks of a Hugging Face tensor, each in the last one's place."""
        slot, region = self._slots[name]
        info, runs = self.tensors[name], row_runs(slot, region)
        for begin, end in row_blocks(info):
            block = self._block.take((end - begin, *info.shape[1:]), info.dtype)
            for run in runs:
                if part := run.within(begin, end):
                    first = part.hf_row - begin
                    self._read_rows(slot, part.slot_row, block[first : first + part.rows])
            yield block

    def _counts(self) -> tuple[int, int]:
        """Layers and experts, by tensors that every architecture of either kind has."""
        found = []
        for axis, name in enumerate(
            ("self_attention.linear_proj.weight", "mlp.experts.experts.linear_fc1.weight")
        ):
            stored = self._metadata.state_dict_metadata.get(f"decoder.layers.{name}")
            shape = stored.size if isinstance(stored, TensorStorageMetadata) else ()
            found.append(shape[axis] if axis < len(shape) else 0)
        return found[0], found[1]

    def _chunks_by_slot(self) -> dict[tuple[str, tuple[int, ...]], list[ChunkStorageMetadata]]:
        """The chunks of each slot: a search through all of them for each takes too long."""
        found: dict[tuple[str, tuple[int, ...]], list[ChunkStorageMetadata]] = {}
        stacked = {slot.key: len(slot.stack) for slot, _ in self._slots.values()}
        for key, axes in stacked.items():
            name, stored = self._stored(key)
            for chunk in getattr(stored, "chunks", ()):
                spans = zip(chunk.offsets[:axes], chunk.sizes[:axes], strict=True)
                for index in itertools.product(*(range(o, o + n) for o, n in spans)):
                    found.setdefault((name, index), []).append(chunk)
        return found

    def _stored(self, key: str) -> tuple[str, Any]:
        """(name, metadata) of a tensor, by either name."""
        known = self._metadata.state_dict_metadata
        name = key if key in known else ALIASES.get(key, key)
        return name, known.get(name)

    def _read_rows(self, slot: Slot, row: int, rows: torch.Tensor) -> None:
        """Fill `rows`, which begin at `row` of a slot, from the chunks that hold them."""
        name, _ = self._stored(slot.key)
        low = (*slot.index, row, *(0 for _ in rows.shape[1:]))
        sizes = (*(1 for _ in slot.index), *rows.shape)
        high = tuple(a + n for a, n in zip(low, sizes, strict=True))
        boxes: list[_Box] = []
        for chunk in self._chunks.get((name, slot.index), ()):
            begin = tuple(max(a, b) for a, b in zip(low, chunk.offsets, strict=True))
            end = tuple(
                min(b, o + n) for b, o, n in zip(high, chunk.offsets, chunk.sizes, strict=True)
            )
            if any(a >= b for a, b in zip(begin, end, strict=True)):
                continue
            boxes.append((begin, end))
            target = tuple(slice(a - o, b - o) for a, b, o in zip(begin, end, low, strict=True))
            part = rows[target[len(slot.index) :]]
            self._read_box(name, chunk, (begin, end), part)
        if not _partition(boxes, rows.numel()):
            held = sum(_volume(box) for box in boxes)
            raise UserError(
                Problem(
                    "a tensor is not covered",
                    f"{self.path}: {name} {list(slot.index)}",
                    f"{held} of {rows.numel()} elements, some perhaps twice",
                    "every element once",
                )
            )

    def _read_box(
        self, name: str, chunk: ChunkStorageMetadata, box: _Box, target: torch.Tensor
    ) -> None:
        """Fill `target` with a box, in the tensor's coordinates, of one chunk."""
        place = self._place(name, chunk)
        shape = tuple(b - a for a, b in zip(*box, strict=True))
        first = place.first + sum(
            (a - o) * stride
            for a, o, stride in zip(box[0], chunk.offsets, place.strides, strict=True)
        )
        last = first + sum((n - 1) * stride for n, stride in zip(shape, place.strides, strict=True))
        direct = target.is_contiguous() and last + 1 - first == target.numel()
        flat = target.view(-1) if direct else self._run.take((last + 1 - first,), target.dtype)
        with open(place.file, "rb", buffering=0) as file:
            file.seek(place.begin + first * target.dtype.itemsize)
            read_into(file, raw_bytes(flat))
        if not direct:
            target.copy_(torch.as_strided(flat, shape, place.strides).view(target.shape))

    def _place(self, name: str, chunk: ChunkStorageMetadata) -> _Place:
        """Where a chunk's elements lie; its `torch.save` archive is read but for the elements."""
        index = MetadataIndex(name, chunk.offsets)
        if index in self._places:
            return self._places[index]
        at = self._metadata.storage_data[index]
        file = self.path / at.relative_path
        where = f"{file}: {name} at {list(chunk.offsets)}"
        try:
            with open(file, "rb") as stream:
                archive = cast("BinaryIO", _create_file_view(stream, at.offset, at.length))
                saved = torch.load(archive, map_location="meta", weights_only=True)
        except (RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as wrong:
            got = "bytes that are no stored tensor"
            raise UserError(
                Problem("a damaged tensor", where, got, "what torch.save wrote", COPY_AGAIN)
            ) from wrong
        expected = f"{self._stored(name)[1].properties.dtype} {list(chunk.sizes)}"
        tensor = isinstance(saved, torch.Tensor)
        found = f"{saved.dtype} {list(saved.shape)}" if tensor else "something else"
        if found != expected:
            raise UserError(Problem("a damaged tensor", where, found, expected, COPY_AGAIN))
        storage = saved.untyped_storage()
        begin = storage._checkpoint_offset  # of the archive; set by torch.load, which documents it
        if begin + storage.nbytes() > at.length:
            got, expected = f"{at.length} bytes", f"{storage.nbytes()} bytes"
            raise UserError(Problem("a damaged tensor", where, got, expected, COPY_AGAIN))
        place = _Place(file, at.offset + begin, saved.storage_offset(), saved.stride())
        self._places[index] = place
        return place

    def _missing_files(self) -> Iterator[Problem]:
        ends: dict[str, int] = {}
        for at in self._metadata.storage_data.values():
            ends[at.relative_path] = max(ends.get(at.relative_path, 0), at.offset + at.length)
        for key, stored in self._metadata.state_dict_metadata.items():
            for chunk in getattr(stored, "chunks", ()):
                if MetadataIndex(key, chunk.offsets) not in self._metadata.storage_data:
                    where = f"{self.path}/{METADATA}: {key} at {list(chunk.offsets)}"
                    yield Problem("a part without a place", where, "no file", "file and offset")
        for name, end in sorted(ends.items()):
            file = self.path / name
            if not file.is_file():
                yield Problem("a file is missing", str(file), "no file", f"{end} bytes", COPY_AGAIN)
            elif file.stat().st_size < end:
                got = f"{file.stat().st_size} bytes"
                yield Problem("a file was cut short", str(file), got, f"{end} bytes", COPY_AGAIN)

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
            vocabulary = key in ("embedding.word_embeddings.weight", "output_layer.weight")
            padded = vocabulary and got[1:] == shape[1:] and is_padded(shape[0], got[0])
            if got != shape and not padded:
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


def is_padded(vocabulary: int, rows: int) -> bool:
    """Whether a trainer pads a vocabulary to so many rows: to a multiple of 8 or 128 × TP.

    A checkpoint of another model with a larger vocabulary is hardly ever taken for one.
    """
    multiples = [rows_a_rank * tp for rows_a_rank in (8, 128) for tp in range(1, 65)]
    return any(rows == round_up(vocabulary, multiple) for multiple in multiples)


def _volume(box: _Box) -> int:
    return math.prod(b - a for a, b in zip(*box, strict=True))


def _partition(boxes: list[_Box], elements: int) -> bool:
    """Whether boxes inside a larger one of so many elements fill it without overlap."""
    apart = all(
        any(a1 >= b2 or a2 >= b1 for a1, b1, a2, b2 in zip(*x, *y, strict=True))
        for x, y in itertools.combinations(boxes, 2)
    )
    return apart and sum(map(_volume, boxes)) == elements


class _Foreign(Exception):
    """A pickle names a class or function that is not of checkpoint metadata."""


def _enum_member(enumeration: Any, name: str) -> Any:
    """In the place of `getattr`, by which early releases of Python 3.11 (that of Debian 12 among
    them) pickle an enumeration's members; others pickle them by value."""
    if isinstance(enumeration, type) and issubclass(enumeration, enum.Enum):
        return enumeration[name]
    raise _Foreign(
        f"builtins.getattr of {enumeration!r}, which has no place in checkpoint metadata"
    )


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):
            return _enum_member
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if dtype or (module, name) in _ALLOWED:
            return super().find_class(module, name)
        raise _Foreign(f"{module}.{name}, which has no place in checkpoint metadata")


def _read_metadata(path: Path) -> Metadata:
    with open(path / METADATA, "rb") as file:
        data = file.read()
    try:
        found = _MetadataUnpickler(io.BytesIO(data)).load()
        if isinstance(found, Metadata) and isinstance(found.storage_data, dict):
            return found
        got = "other data"
    except _Foreign as wrong:
        got = str(wrong)
    except Exception:  # a damaged pickle can raise anything
        got = f"{len(data)} bytes that cannot be read as it"
    raise UserError(
        Problem(
            "cannot read the checkpoint's metadata", f"{path}/{METADATA}", got,
            "what PyTorch's distributed checkpoint writes",
            COPY_AGAIN,
        )
    )  # fmt: skip
