"""Carry wheels to a machine without a network: parts of at most 60 MB, and a manifest of hashes.

    pip download --no-deps -r requirements/gpu.txt -d wheels      # where there is a network
    python tools/bundle_wheels.py pack wheels bundle
    python bundle_wheels.py assemble bundle wheels                # there; it needs Python alone
    pip install --no-index --find-links wheels --no-deps -r requirements/gpu.txt

The files follow each other as one stream, which is cut into parts of equal size; the manifest has
the hash of every part and of every file. `assemble` looks at all parts before it writes a file,
and names every one that is missing or damaged, so that only those are carried again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

MANIFEST = "manifest.json"
PART_BYTES = 60_000_000
CHUNK_BYTES = 1 << 20


class BundleError(Exception):
    """What is wrong with a bundle, one line a problem."""


def pack(wheels: Path, bundle: Path, part_bytes: int = PART_BYTES) -> int:
    """Write a bundle of all files of a folder.

    Args:
        wheels: a folder of files, wheels and source distributions.
        bundle: a folder that does not exist or is empty.
        part_bytes: of a part at most.

    Returns:
        How many parts there are.

    Raises:
        BundleError: where there is nothing to pack, or something lies at `bundle`.
    """
    files = sorted(path for path in wheels.iterdir() if path.is_file())
    if not files:
        raise BundleError(f"{wheels}: no files")
    bundle.mkdir(parents=True, exist_ok=True)
    if any(bundle.iterdir()):
        raise BundleError(f"{bundle}: not empty; parts of another bundle would be mixed in")
    parts: list[dict[str, object]] = []
    sums = {path.name: hashlib.sha256() for path in files}
    part: BinaryIO | None = None
    part_sum, written = hashlib.sha256(), 0

    def close() -> None:
        if part is not None:
            part.close()
            name = Path(part.name).name
            parts.append({"name": name, "bytes": written, "sha256": part_sum.hexdigest()})

    for path in files:
        for chunk in _chunks(path):
            sums[path.name].update(chunk)
            while chunk:
                if part is None or written == part_bytes:
                    close()
                    part = (bundle / f"part.{len(parts):04d}").open("wb")
                    part_sum, written = hashlib.sha256(), 0
                head, chunk = chunk[: part_bytes - written], chunk[part_bytes - written :]
                part.write(head)
                part_sum.update(head)
                written += len(head)
    close()
    listed = [
        {"name": path.name, "bytes": path.stat().st_size, "sha256": sums[path.name].hexdigest()}
        for path in files
    ]
    text = json.dumps({"files": listed, "parts": parts}, indent=1) + "\n"
    (bundle / MANIFEST).write_text(text, encoding="utf-8")
    return len(parts)


def damaged(bundle: Path) -> list[str]:
    """A line for every part that is missing, of another size, or of another content.

    Raises:
        BundleError: without a manifest that can be read.
    """
    found = []
    for part in _manifest(bundle)["parts"]:
        path = bundle / part["name"]
        if not path.is_file():
            found.append(f"{path}: missing")
        elif path.stat().st_size != part["bytes"]:
            found.append(f"{path}: {path.stat().st_size} bytes, not {part['bytes']}")
        elif _sha256(path) != part["sha256"]:
            found.append(f"{path}: damaged; its content is not what was packed")
    return found


def assemble(bundle: Path, wheels: Path) -> int:
    """Check a bundle and write its files.

    Returns:
        How many files were written.

    Raises:
        BundleError: naming every part, then every file, that is not what was packed; no file is
            written where a part is wrong.
    """
    if wrong := damaged(bundle):
        raise BundleError("\n".join(wrong))
    manifest = _manifest(bundle)
    wheels.mkdir(parents=True, exist_ok=True)
    stream = _stream([bundle / part["name"] for part in manifest["parts"]])
    rest = b""
    wrong = []
    for entry in manifest["files"]:
        left, digest = entry["bytes"], hashlib.sha256()
        if Path(entry["name"]).name != entry["name"]:
            raise BundleError(f"{bundle / MANIFEST}: {entry['name']!r} is no name of a file")
        with (wheels / entry["name"]).open("wb") as file:
            while left:
                rest = rest or next(stream)
                head, rest = rest[:left], rest[left:]
                file.write(head)
                digest.update(head)
                left -= len(head)
        if digest.hexdigest() != entry["sha256"]:
            wrong.append(f"{wheels / entry['name']}: not what was packed")
    if wrong:
        raise BundleError("\n".join(wrong))
    return len(manifest["files"])


def _manifest(bundle: Path) -> dict[str, list[dict[str, Any]]]:
    path = bundle / MANIFEST
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: {error}") from error


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as file:
        while chunk := file.read(CHUNK_BYTES):
            yield chunk


def _stream(paths: list[Path]) -> Iterator[bytes]:
    for path in paths:
        yield from _chunks(path)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    return digest.hexdigest()


def main(arguments: list[str] | None = None) -> int:
    """The command; 0, or 2 with what is wrong."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, first, second in (("pack", "wheels", "bundle"), ("assemble", "bundle", "wheels")):
        command = commands.add_parser(name)
        command.add_argument(first, type=Path)
        command.add_argument(second, type=Path)
    asked = parser.parse_args(arguments)
    try:
        if asked.command == "pack":
            parts = pack(asked.wheels, asked.bundle)
            print(f"{asked.bundle}: {parts} parts and {MANIFEST}")
        else:
            count = assemble(asked.bundle, asked.wheels)
            print(f"{asked.wheels}: {count} files, each as it was packed")
    except BundleError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
