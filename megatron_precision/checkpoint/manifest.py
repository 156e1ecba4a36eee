"""`conversion_manifest.json`: what a finished folder holds, written last.

The converter writes one SHA-256 a Hugging Face tensor, over its bytes in row-major order. The hash
does not depend on the format or on how a checkpoint is divided, so that both sides of a conversion
carry the same. The other files (configuration, tokenizer, chat template) have a hash each.

A trainer's ranks hold parts of tensors: its checkpoints have a hash of every file instead.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_precision.errors import Problem, UserError
from megatron_precision.weights.hf_config import read_object

FILE = "conversion_manifest.json"
VERSION = 1
# The remedy for what was damaged or lost after it was written.
COPY_AGAIN = "copy it again from where it was written"
_RESTORE = (
    f"{COPY_AGAIN}; a change that is wanted belongs into the folder that was converted: "
    "change it there, and convert again"
)
# Their contents are hashed tensor by tensor.
_TENSOR_FILES = (".distcp", ".safetensors")


@dataclass(frozen=True)
class Manifest:
    """Hashes of tensors and of files.

    Attributes:
        tensors: Hugging Face name → hexadecimal SHA-256; empty in a trainer's checkpoint.
        sizes: path inside the folder → bytes, of files that the tensors' hashes stand for.
        files: path inside the folder → hexadecimal SHA-256, of all others.
    """

    tensors: dict[str, str]
    sizes: dict[str, int]
    files: dict[str, str]

    @property
    def is_by_file(self) -> bool:
        """Whether every file is hashed, and so no tensor, as in a trainer's checkpoint."""
        return not self.tensors and not self.sizes

    def hash_of(self, name: str) -> str | None:
        """The hash of a tensor, where it is known."""
        return self.tensors.get(name)

    def write(self, folder: Path) -> None:
        """Write it; call last."""
        values = {
            "version": VERSION, "sizes": self.sizes, "files": self.files, "tensors": self.tensors
        }  # fmt: skip
        (folder / FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> Manifest | None:
    """The manifest of a folder, or None where it has none.

    Raises:
        UserError: where it cannot be read, or files are missing, cut short, too long or changed.
    """
    found = listed(folder)
    if found is not None and (problems := list(file_problems(folder, found, found.files))):
        raise UserError(problems)
    return found


def listed(folder: Path) -> Manifest | None:
    """The manifest of a folder as it stands, of which no file has been looked at.

    Raises:
        UserError: where it cannot be read.
    """
    path = folder / FILE
    if not path.exists():
        return None
    remedy = f"{COPY_AGAIN}; a folder without it is read, but nothing in it is checked"
    values = read_object(path, "the manifest", remedy)
    if got := _malformed(values):
        raise UserError(
            Problem(
                "cannot read the manifest", str(path), got, f"what version {VERSION} writes", remedy
            )
        )
    return Manifest(values["tensors"], values["sizes"], values["files"])


def _malformed(values: Mapping[str, Any]) -> str:
    """What is not as `Manifest.write` leaves it, or nothing."""
    if values.get("version") != VERSION:
        return f"version {values['version']}" if "version" in values else "no version"
    for name, kind in (("tensors", str), ("sizes", int), ("files", str)):
        held = values.get(name)
        if not isinstance(held, dict) or not all(isinstance(v, kind) for v in held.values()):
            return f"no list of {name}, or a damaged one"
    return ""


def file_problems(folder: Path, found: Manifest, hashed: Iterable[str]) -> Iterator[Problem]:
    """What is wrong with the files of a folder.

    Args:
        hashed: those of `found.files` whose bytes are read.
    """
    for name, size in found.sizes.items():
        path = folder / name
        if not path.is_file():
            yield Problem("a file is missing", str(path), "no file", f"{size} bytes", COPY_AGAIN)
        elif path.stat().st_size != size:
            got = f"{path.stat().st_size} bytes"
            yield Problem("a file of another size", str(path), got, f"{size} bytes", COPY_AGAIN)
    for name in hashed:
        path, digest = folder / name, found.files[name]
        expected = f"sha256 {digest}"
        if not path.is_file():
            yield Problem("a file is missing", str(path), "no file", expected, COPY_AGAIN)
        elif (got := f"sha256 {file_hash(path)}") != expected:
            yield Problem("a file is not as it was written", str(path), got, expected, _RESTORE)


def made(tensors: dict[str, str], folder: Path) -> Manifest:
    """The manifest of a folder that is otherwise complete.

    Args:
        tensors: Hugging Face name → hexadecimal SHA-256.
    """
    names = sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and path.name != FILE
    )
    holding = [name for name in names if name.endswith(_TENSOR_FILES)]
    return Manifest(
        tensors,
        {name: (folder / name).stat().st_size for name in holding},
        {name: file_hash(folder / name) for name in names if name not in holding},
    )


def file_hash(path: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
