"""The folder that a conversion writes: whole, or not there.

Everything is written into `<target>.partial`; then the folder is renamed. A conversion that was
killed leaves the partial folder, which the next one removes; one that Ctrl-C or SIGTERM stopped
has removed it itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from megatron_precision.checkpoint.folders import to_disk
from megatron_precision.config.errors import Problem, UserError
from tools.checkpoint_convert.folders import PARTIAL, target_problems
from tools.checkpoint_convert.workers import uninterrupted

# Beyond the tensors: headers, tokenizer, metadata.
_ROOM_FOR_THE_REST = 64 * 2**20


@contextlib.contextmanager
def new_folder(source: Path, target: Path, size: int) -> Iterator[Path]:
    """A folder beside `target` to write into; it becomes `target` when the block succeeds.

    Args:
        source: what is read.
        size: bytes that will be written.

    Raises:
        UserError: where `target` exists or lies inside `source`, another conversion writes it, or
            room is short.
    """
    if problems := target_problems(source, target):
        raise UserError(problems)
    target = target.resolve()
    partial = target.with_name(target.name + PARTIAL)
    target.parent.mkdir(parents=True, exist_ok=True)
    with _lock(target) as interrupted:
        if partial.exists() and not interrupted:
            # Only what a conversion has made is ever removed.
            raise UserError(
                Problem(
                    "a folder of somebody else's is in the way",
                    str(partial),
                    "a file or folder that no conversion made",
                    "nothing, or an unfinished conversion",
                    "choose another output",
                )
            )
        try:
            shutil.rmtree(partial, ignore_errors=True)
            _refuse_short_room(target.parent, size + _ROOM_FOR_THE_REST)
            partial.mkdir()
            yield partial
            to_disk(partial)
            partial.rename(target)
        except BaseException:
            with uninterrupted():
                shutil.rmtree(partial, ignore_errors=True)
            raise
        to_disk(target.parent)


def _refuse_short_room(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < size:
        raise UserError(
            Problem(
                "no room on the disk",
                str(folder),
                f"{free / 2**30:.2f} GiB free",
                f"{size / 2**30:.2f} GiB",
            )
        )


@contextlib.contextmanager
def _lock(target: Path) -> Iterator[bool]:
    """Keep other conversions away from a target.

    Yields:
        Whether one was killed here: it leaves its lock, and perhaps an unfinished folder.
    """
    path = target.with_name(f".{target.name}.lock")
    interrupted, lock = path.exists(), None
    try:
        with uninterrupted():  # a lock that is taken is one that will be removed
            lock = _taken(path, target)
        yield interrupted
    finally:
        if lock is not None:
            with uninterrupted(), lock:
                path.unlink(missing_ok=True)


def _taken(path: Path, target: Path) -> TextIO:
    lock = open(path, "a", encoding="ascii")  # noqa: SIM115 it is held until it is closed
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        lock.close()
        raise UserError(
            Problem("another conversion is writing it", str(target), "a lock", "one at a time")
        ) from None
    return lock
