"""`conversion_manifest.json`: what a finished folder holds, written last.

One SHA-256 a Hugging Face tensor, over its bytes in row-major order. The hash does not depend on
the format or on how a checkpoint is divided, so that both sides of a conversion carry the same.
The other files (configuration, tokenizer, chat template) have a hash each.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from megatron_precision.errors import Problem, UserError

FILE = "conversion_manifest.json"
VERSION = 1
# Their contents are hashed tensor by tensor.
_TENSOR_FILES = (".distcp", ".safetensors")


@dataclass(frozen=True)
class Manifest:
    """Hashes of tensors and of files.

    Attributes:
        tensors: Hugging Face name → hexadecimal SHA-256.
        sizes: path inside the folder → bytes, of the files that hold tensors.
        files: path inside the folder → hexadecimal SHA-256, of all others.
    """

    tensors: dict[str, str]
    sizes: dict[str, int]
    files: dict[str, str]

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
        UserError: where it cannot be read, or files are missing, cut short or too long.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if values["version"] != VERSION:
            raise ValueError(f"version {values['version']}")
        found = Manifest(dict(values["tensors"]), dict(values["sizes"]), dict(values["files"]))
    except (OSError, ValueError, KeyError, TypeError) as wrong:
        raise UserError(
            Problem("cannot read the manifest", str(path), repr(wrong), f"version {VERSION}")
        ) from wrong
    written = {name: f"{size} bytes" for name, size in found.sizes.items()} | {
        name: f"sha256 {digest}" for name, digest in found.files.items()
    }
    problems = [
        Problem(
            "a file is not as it was written", f"{folder}/{name}", got, expected,
            f"restore it; or delete {FILE}, and the folder is taken as it is",
        )
        for name, expected in written.items()
        if (got := _state(folder / name)) != expected
    ]  # fmt: skip
    if problems:
        raise UserError(problems)
    return found


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
        {name: _hash(folder / name) for name in names if name not in holding},
    )


def _state(path: Path) -> str:
    if not path.is_file():
        return "no such file"
    if path.name.endswith(_TENSOR_FILES):
        return f"{path.stat().st_size} bytes"
    return f"sha256 {_hash(path)}"


def _hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
