"""Reads and writes Hugging Face folders of sharded safetensors files in blocks of rows.

The format is eight bytes of header length, a JSON header with dtypes, shapes and offsets, and the
tensors' bytes. The header is parsed here and blocks are read and written in order, because the
safetensors library maps whole files or wants whole shards in memory, so that memory grows with the
model.
"""

from __future__ import annotations

import json
import math
import os
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_precision.checkpoint import manifest
from megatron_precision.config.errors import Problem, UserError
from megatron_precision.layouts.architectures import hf_shapes
from megatron_precision.layouts.hf_config import read_model, read_object
from megatron_precision.precision.dtypes import torch_dtype
from tools.checkpoint_convert.blocks import (
    Scratch,
    TensorInfo,
    counted,
    raw_bytes,
    read_into,
    row_blocks,
)

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


INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 4 * 2**30
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"model\.layers\.\d+\.mlp\.experts\.(\d+)\.")
# Buffers that old checkpoints store and every reader computes.
_COMPUTED = re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq")


@dataclass(frozen=True)
class _Place:
    file: Path
    begin: int


class SafetensorsFolder:
    """A Hugging Face folder as a `Source`.

    Raises:
        UserError: lists every shard that is missing or damaged, and every tensor that is missing,
            unexpected, or of another shape than the configuration says.
    """

    def __init__(self, path: Path) -> None:
        self.path = self.sidecar = path
        self.model = read_model(path / "config.json")
        self.manifest = manifest.read(path)
        found, listed, whole, problems = _read_headers(path)
        names = found.keys() | listed.keys()
        shown, wrong = counted(
            self.model, _numbers(_LAYER, names), _numbers(_EXPERT, names), path / "config.json"
        )
        problems += wrong
        expected = hf_shapes(shown)
        problems += _misplaced(
            path, found, {n: f for n, f in listed.items() if f in whole}, expected
        )
        if self.model.tie_word_embeddings:
            problems += _untied_head(path, found)
        found = {name: at for name, at in found.items() if not _COMPUTED.fullmatch(name)}
        if problems:  # what a shard that is lost would hold is not missed name by name
            lost = {n for n in expected if (listed[n] not in whole if n in listed else not listed)}
            expected = {n: s for n, s in expected.items() if n in found or n not in lost}
        problems += _differences(path, expected, {name: info for name, (info, _) in found.items()})
        if problems:
            raise UserError(problems)
        self.tensors = {name: found[name][0] for name in expected}
        self._places = {name: place for name, (_, place) in found.items()}
        self._scratch = Scratch()

    def blocks(self, name: str) -> Iterator[torch.Tensor]:
        """Row blocks of a tensor, each in the last one's place."""
        yield from _blocks(self.tensors[name], self._places[name], self._scratch)


class SafetensorsWriter:
    """Writes the shards of a folder, tensor by tensor, in the order given to it.

    Args:
        folder: exists.
        tensors: name → what will be written.
        shard_bytes: a shard is closed before it would grow beyond this.
    """

    def __init__(
        self, folder: Path, tensors: Mapping[str, TensorInfo], shard_bytes: int = SHARD_BYTES
    ) -> None:
        self._folder = folder
        self._tensors = dict(tensors)
        self.shards: list[list[str]] = [[]]
        filled = 0
        for name, info in tensors.items():
            if self.shards[-1] and filled + info.bytes > shard_bytes:
                self.shards.append([])
                filled = 0
            self.shards[-1].append(name)
            filled += info.bytes

    def file_of(self, shard: int) -> Path:
        """The shard's file."""
        if len(self.shards) == 1:
            return self._folder / SINGLE
        return self._folder / f"model-{shard + 1:05d}-of-{len(self.shards):05d}.safetensors"

    def write_shard(self, shard: int, blocks: Iterator[tuple[str, torch.Tensor]]) -> None:
        """Write one shard.

        Args:
            blocks: (name, row block), of the shard's tensors in its order.

        Raises:
            ValueError: where the blocks are not those of the shard.
        """
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        ends, offset = {}, 0
        for name in self.shards[shard]:
            info = self._tensors[name]
            end = offset + info.bytes
            header[name] = {
                "dtype": _CODES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [offset, end],
            }
            ends[name] = offset = end
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        with open(self.file_of(shard), "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            written = 0
            for name, block in blocks:
                if block.dtype != self._tensors[name].dtype:
                    raise ValueError(f"{name}: a block of {block.dtype}")
                written += file.write(raw_bytes(block))
                if written > ends[name]:
                    raise ValueError(f"{name}: more bytes than its shape has, or out of order")
            if written != offset:
                raise ValueError(f"{file.name}: {written} of {offset} bytes were written")
            file.flush()
            os.fsync(file.fileno())

    def write_index(self) -> None:
        """Write the index of several shards; one shard needs none."""
        if len(self.shards) == 1:
            return
        total = sum(info.bytes for info in self._tensors.values())
        weight_map = {
            name: self.file_of(number).name
            for number, names in enumerate(self.shards)
            for name in names
        }
        values = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (self._folder / INDEX).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def _blocks(info: TensorInfo, place: _Place, scratch: Scratch) -> Iterator[torch.Tensor]:
    with open(place.file, "rb", buffering=0) as file:
        file.seek(place.begin)
        for begin, end in row_blocks(info):
            block = scratch.take((end - begin, *info.shape[1:]), info.dtype)
            read_into(file, raw_bytes(block))
            yield block


def _numbers(pattern: re.Pattern[str], names: Iterable[str]) -> int:
    """How many different numbers the names have where a pattern takes one."""
    return len({match[1] for name in names if (match := pattern.match(name))})


def _read_headers(
    folder: Path,
) -> tuple[dict[str, tuple[TensorInfo, _Place]], dict[str, str], set[str], list[Problem]]:
    """Where each tensor lies, where the index says so, the shards read, and what is wrong."""
    files, listed, problems = _files(folder)
    found: dict[str, tuple[TensorInfo, _Place]] = {}
    whole: set[str] = set()
    for file in files:
        try:
            entries = read_header(file)
        except DamagedHeader as wrong:
            problems.append(
                Problem(
                    "a damaged shard", str(file), str(wrong), "a whole safetensors file",
                    "copy it again from where it came",
                )
            )  # fmt: skip
            continue
        except OtherDtype as wrong:
            problems += [
                Problem(
                    "a dtype that is not converted", f"{file}: {name}", dtype, ", ".join(DTYPES),
                    "convert the checkpoint that it was quantised from",
                )
                for name, dtype in wrong.dtypes.items()
            ]  # fmt: skip
            continue
        whole.add(file.name)
        for name, dtype, shape, begin in entries:
            if name in found:
                two = f"{found[name][1].file.name} and {file.name}"
                problems.append(Problem("a tensor twice", f"{folder}: {name}", two, "one"))
            found[name] = (TensorInfo(shape, dtype), _Place(file, begin))
    return found, listed, whole, problems


def _misplaced(
    folder: Path, found: Mapping[str, Any], listed: Mapping[str, str], expected: Mapping[str, Any]
) -> Iterator[Problem]:
    """What the index says of shards that were read, and is not so; missing tensors apart."""
    for name, file_name in listed.items():
        place = found.get(name)
        if place[1].file.name != file_name if place else name not in expected:
            yield Problem(
                "the index is wrong", f"{folder}/{INDEX}", f"{name} in {file_name}",
                "the shard that holds it",
            )  # fmt: skip


def _files(folder: Path) -> tuple[list[Path], dict[str, str], list[Problem]]:
    """The shards that are there, the index's map, and what is wrong with either."""
    single, index = folder / SINGLE, folder / INDEX
    if not index.is_file():
        if single.is_file():
            return [single], {}, []
        return [], {}, [_without_index(folder)]
    listed = read_object(index, "the index").get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        expected = "a weight_map of each tensor's name to its shard's"
        return [], {}, [Problem("cannot read the index", str(index), "none such", expected)]
    files = [folder / name for name in sorted(set(listed.values()))]
    missing = [
        Problem(
            "the index names a shard that is not there", str(file), "no file", "the shard",
            "copy it again from where it came",
        )
        for file in files
        if not file.is_file()
    ]  # fmt: skip
    if single.is_file() and single not in files:
        got = f"{SINGLE} beside {INDEX}, which does not list it"
        missing.append(Problem("weights twice", str(folder), got, "one of them"))
    return [file for file in files if file.is_file()], listed, missing


def _without_index(folder: Path) -> Problem:
    shards = len(list(folder.glob("*.safetensors")))
    if shards:
        return Problem(
            "the index of the shards is missing", f"{folder}/{INDEX}",
            f"no file, and {shards} shard{'s' * (shards != 1)}",
            "the file that says which shard holds which tensor",
            "copy it again from where the shards came",
        )  # fmt: skip
    expected = f"{SINGLE}, or {INDEX} with its shards"
    return Problem("no weights", str(folder), "no safetensors", expected)


def _untied_head(folder: Path, found: dict[str, tuple[TensorInfo, _Place]]) -> Iterator[Problem]:
    """Take the head that some writers repeat out of what was found; it must be the embedding."""
    head = found.pop("lm_head.weight", None)
    embedding = found.get("model.embed_tokens.weight")
    if head is None or embedding is None:
        return
    same = head[0] == embedding[0] and all(
        torch.equal(a.view(torch.uint8), b.view(torch.uint8))
        for a, b in zip(_blocks(*head, Scratch()), _blocks(*embedding, Scratch()), strict=True)
    )
    if not same:
        yield Problem(
            "tied embeddings with a head of its own",
            f"{folder}: lm_head.weight",
            "other values than model.embed_tokens.weight",
            "the same, or tie_word_embeddings false in config.json",
        )


def _differences(
    folder: Path, expected: Mapping[str, tuple[int, ...]], found: Mapping[str, TensorInfo]
) -> Iterator[Problem]:
    for name, shape in expected.items():
        if name not in found:
            yield Problem("a missing tensor", f"{folder}: {name}", "nothing", f"shape {shape}")
        elif found[name].shape != shape:
            yield Problem(
                "a tensor of another shape", f"{folder}: {name}", str(found[name].shape), str(shape)
            )
    for name in found:
        if name not in expected:
            yield Problem(
                "an unexpected tensor",
                f"{folder}: {name}",
                f"shape {found[name].shape}",
                "the tensors of the architecture in config.json, and no others",
            )
