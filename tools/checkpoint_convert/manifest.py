"""`conversion_manifest.json`: what a finished folder holds, written last.

One SHA-256 a Hugging Face tensor, over its bytes in row-major order. The hash does not depend on
the format or on how a checkpoint is divided, so that both sides of a conversion carry the same.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from megatron_precision.errors import Problem, UserError

FILE = "conversion_manifest.json"
VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """Hashes of tensors and sizes of files.

    Attributes:
        tensors: Hugging Face name → hexadecimal SHA-256.
        files: path inside the folder → bytes.
    """

    tensors: dict[str, str]
    files: dict[str, int]

    def hash_of(self, name: str) -> str | None:
        """The hash of a tensor, where it is known."""
        return self.tensors.get(name)

    def write(self, folder: Path) -> None:
        """Write it; call last."""
        values = {"version": VERSION, "files": self.files, "tensors": self.tensors}
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
        found = Manifest(dict(values["tensors"]), dict(values["files"]))
    except (OSError, ValueError, KeyError, TypeError) as wrong:
        raise UserError(
            Problem("cannot read the manifest", str(path), repr(wrong), f"version {VERSION}")
        ) from wrong
    problems = []
    for name, size in found.files.items():
        there = (folder / name).stat().st_size if (folder / name).is_file() else None
        if there != size:
            got = "no such file" if there is None else f"{there} bytes"
            problems.append(
                Problem("a file is not as it was written", f"{folder}/{name}", got, f"{size} bytes")
            )
    if problems:
        raise UserError(problems)
    return found


def file_sizes(folder: Path) -> dict[str, int]:
    """Sizes of all files of a folder but the manifest."""
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (FILE, ".conversion")
    }
