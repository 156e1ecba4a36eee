"""Writes and reads `conversion_manifest.json`, which lists a finished folder and is written last.

The converter writes one SHA-256 per Hugging Face tensor, over its bytes in row-major order. The
hash depends neither on the format nor on how a checkpoint is divided, so both sides of a conversion
have the same. Other files (configuration, tokenizer, chat template) have a hash each; a Megatron
checkpoint has copies of them in its sidecar folder. A trainer's ranks have parts of tensors, so its
checkpoints have a hash of every file instead.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_precision.config.errors import Problem, UserError
from megatron_precision.layouts.hf_config import read_object

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
        """True if files are hashed instead of tensors, as in a trainer's checkpoint."""
        return not self.tensors and not self.sizes

    def hash_of(self, name: str) -> str | None:
        """Return the hash of a tensor; None if unknown."""
        return self.tensors.get(name)

    def write(self, folder: Path) -> None:
        """Write the manifest, after everything else."""
        values = {
            "version": VERSION, "sizes": self.sizes, "files": self.files, "tensors": self.tensors
        }  # fmt: skip
        (folder / FILE).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def read(folder: Path) -> Manifest | None:
    """Read the manifest of a folder; None if it has none.

    Raises:
        UserError: where it cannot be read, or files are missing, cut short, too long or changed.
    """
    found = listed(folder)
    if found is not None and (problems := list(file_problems(folder, found, found.files))):
        raise UserError(problems)
    return found


def listed(folder: Path) -> Manifest | None:
    """Read the manifest of a folder without checking any file.

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
    """Describe what `Manifest.write` would not have written; "" if nothing."""
    if values.get("version") != VERSION:
        return f"version {values['version']}" if "version" in values else "no version"
    for name, kind in (("tensors", str), ("sizes", int), ("files", str)):
        held = values.get(name)
        if not isinstance(held, dict) or not all(isinstance(v, kind) for v in held.values()):
            return f"no list of {name}, or a damaged one"
    return ""


def file_problems(folder: Path, found: Manifest, hashed: Iterable[str]) -> Iterator[Problem]:
    """List what is wrong with the files of a folder.

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
    """Make the manifest of a folder that is otherwise complete.

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
    """Return the hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


if TYPE_CHECKING:
    import torch

# The folder of config, tokenizer and chat template inside a `torch_dist` checkpoint.
SIDECAR = "huggingface"
# Other formats' weights, which the new checkpoint's are not; any *.index.json belongs to weights.
_WEIGHTS = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data",
     ".ot", ".tflite"}
)  # fmt: skip
# The one folder beside the tokenizer that transformers reads.
_TEMPLATES = "additional_chat_templates"


def copy_sidecar(source: Path, target: Path) -> None:
    """Copy config, generation config, tokenizer and chat templates, byte for byte."""
    for path in sorted([*source.iterdir(), *source.glob(f"{_TEMPLATES}/*")]):
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name != FILE:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def state_dtype(config: Path, dtypes: Iterable[torch.dtype]) -> None:
    """Write the weights' dtype into `config.json`: readers load them in that dtype.

    Where it says so already, or the weights have several, the file stays byte for byte.
    """
    kinds = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    values = json.loads(config.read_text(encoding="utf-8"))
    fields = [name for name in ("dtype", "torch_dtype") if name in values] or ["torch_dtype"]
    if len(kinds) == 1 and any(values.get(field) not in kinds for field in fields):
        values |= dict.fromkeys(fields, *kinds)
        config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
