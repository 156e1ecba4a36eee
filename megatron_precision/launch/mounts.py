"""Parses mounts of a container, `HOST[:CONTAINER[:ro|rw]]`, and translates paths through them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from megatron_precision.config.errors import Problem

# A comma, a colon or a space ends a path in the lists that pyxis and Docker read.
_ODD = re.compile(r"[\s,:'\"\\$]")
_FLAGS = ("ro", "rw")


@dataclass(frozen=True)
class Mount:
    """The host's folder `host`, which a container calls `container`.

    Attributes:
        flag: `ro`, `rw` or empty.
    """

    host: str
    container: str
    flag: str = ""

    def __str__(self) -> str:
        return ":".join(filter(None, (self.host, self.container, self.flag)))


def parse(text: str, where: str) -> tuple[Mount | None, list[Problem]]:
    """Parse a mount as a user writes it.

    Args:
        where: the option or the key of a file that has the text, for error messages.

    Returns:
        The mount, or None if the text has problems; the problems.
    """
    host, *rest = text.split(":")
    flag = rest.pop() if rest and rest[-1] in _FLAGS else ""
    container = rest.pop(0) if rest else host
    sides = [("host", host)] + ([("container", container)] if container != host else [])
    problems = [
        Problem(
            f"the {side}'s folder is no absolute path",
            where,
            repr(path),
            "a path that begins with /",
        )
        for side, path in sides
        if not path.startswith("/")
    ]
    if rest:
        problems.append(Problem("a mount of too many parts", where, text, "HOST[:CONTAINER[:ro]]"))
    if _ODD.search(host) or _ODD.search(container):
        problems.append(odd_path("a mount", where, text))
    return (None, problems) if problems else (Mount(host, container, flag), [])


def odd_path(what: str, where: str, text: str) -> Problem:
    """Return the problem for a path that a container's options cannot carry."""
    return Problem(
        what=f"{what} with a character that container options cannot carry",
        where=where,
        got=repr(text),
        expected="no space, comma, quote, backslash or $",
        remedy="a symbolic link without them does",
    )


def has_odd_character(path: str) -> bool:
    """Whether a container's options cannot carry the path; `odd_path` is its problem."""
    return _ODD.search(path) is not None


def on_host(path: str, mounts: Sequence[Mount]) -> str:
    """Translate a container path to the host's path.

    A path outside all mounts is returned as it is: `covering` mounts it under the same name.
    """
    best = max(
        (mount for mount in mounts if PurePosixPath(path).is_relative_to(mount.container)),
        key=lambda mount: len(mount.container),
        default=None,
    )
    if best is None:
        return path
    return str(PurePosixPath(best.host) / PurePosixPath(path).relative_to(best.container))


def covering(folders: Iterable[Path], mounts: Sequence[Mount]) -> list[Mount]:
    """Return `mounts`, and a mount under the same name for every folder that they do not cover."""
    needed: list[PurePosixPath] = []
    for folder in sorted({PurePosixPath(folder) for folder in folders}):
        seen = [*(PurePosixPath(mount.container) for mount in mounts), *needed]
        if not any(folder.is_relative_to(path) for path in seen):
            needed.append(folder)
    return [*mounts, *(Mount(str(path), str(path)) for path in needed)]
