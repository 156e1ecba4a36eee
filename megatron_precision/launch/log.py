"""Reads the logs of a job: rank 0's lines while it runs, and the reason if it fails.

torchrun marks each line with `[default<local rank>]:` and writes every rank's output to its own
file. nemo-run collects the output of torchrun in `combined.log`, and its standard output alone in
`stdout.log` beside it. On Slurm the two files are `log-*.err` and `log-*.out`.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_precision.checkpoint import folders
from megatron_precision.platform import process

COMBINED = "combined.log"
SLURM_ERRORS = "log-*.err"
POLL_S = 0.2
TAIL_LINES = 25
_MARK = re.compile(r"\[default\d+\]:")
_FAILURES = re.compile(
    r"^(?:Failures:\n(?P<others>.*?))?Root Cause \(first observed failure\):(?P<first>.*)",
    re.DOTALL | re.MULTILINE,
)
_FAILURE = re.compile(r"rank\s*:\s*(\d+) \(local_rank: (\d+)\).*?exitcode\s*:\s*(-?\d+)", re.DOTALL)


class Lines:
    """Prints the new lines that the first rank of a machine has written to its standard output.

    Standard error is not printed: libraries fill it with warnings, and torchrun lists every rank
    there. `describe_failure` shows the reason of a failure at the end.
    """

    def __init__(self, find: Callable[[], Iterable[Path]]) -> None:
        """
        Args:
            find: returns the log files that exist by now.
        """
        self._find = find
        self._positions: dict[Path, int] = {}
        self._rests: dict[Path, str] = {}

    def show(self, last: bool = False) -> None:
        """Print the new lines, and an unfinished line if this is the last call."""
        for path in self._find():
            with open(path, encoding="utf-8", errors="replace", newline="\n") as log:
                log.seek(self._positions.get(path, 0))
                text = self._rests.get(path, "") + log.read()
                self._positions[path] = log.tell()
            *lines, rest = text.split("\n")
            self._rests[path] = "" if last else rest
            _show([*lines, rest] if last else lines)


class Follower(contextlib.AbstractContextManager["Follower"]):
    """Prints a local job's lines while it runs."""

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: the job's log folder; the log appears in it later.
        """
        self._folder = folder
        self._lines = Lines(self._files)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._ended.set()
        self._thread.join()

    def _files(self) -> list[Path]:
        combined = next(self._folder.rglob(COMBINED), None)
        return [] if combined is None else [combined.with_name("stdout.log")]

    def _follow(self) -> None:
        while not self._ended.wait(POLL_S):
            self._lines.show()
        self._lines.show(last=True)


def _show(lines: list[str]) -> None:
    for line in lines:
        mark = _MARK.match(line)
        if mark:
            print(line[mark.end() :], flush=True)


@dataclass(frozen=True)
class Death:
    """How the first rank ended, as torchrun reports it; a negative exit code is minus a signal."""

    rank: int
    local_rank: int
    exit_code: int

    @property
    def was_killed(self) -> bool:
        """Whether a signal other than SIGTERM, which torchrun sends itself, ended the rank."""
        return self.exit_code < 0 and self.exit_code != -signal.SIGTERM


def first_death(*folders: Path) -> Death | None:
    """Return the first rank to end according to the newest of torchrun's reports, if there is one.

    torchrun calls the lowest rank the first among ranks that it finds dead at the same time. A
    killed rank is preferred here: it breaks the collective of a rank that then raises, and never
    the other way round.
    """
    logs = [path for name in (COMBINED, SLURM_ERRORS) for path in _under(folders, name)]
    for path in logs:
        found = _FAILURES.search(path.read_text(encoding="utf-8", errors="replace"))
        if found and (root := _FAILURE.search(found["first"])):
            others = _FAILURE.findall(found["others"] or "")
            deaths = [Death(*map(int, words)) for words in (root.groups(), *others)]
            return next((death for death in deaths if death.was_killed), deaths[0])
    return None


def describe_failure(run: Path, *logs: Path) -> str:
    """Describe why a job failed: the rank that failed first, and its own message.

    Args:
        run: the folder with `errors/`.
        logs: folders with the job's logs; the folder with every rank's log comes first.
    """
    failure, death = process.first_failure(run), first_death(*logs)
    if failure is not None and failure.user_error:
        return failure.text
    parts = [f"{'=' * 30} the job failed {'=' * 30}"]
    if death is not None and death.was_killed:
        name = signal.Signals(-death.exit_code).name
        parts.append(f"rank {death.rank} was killed by {name}; it could leave no traceback.")
        if failure is not None:
            parts.append(f"Then rank {failure.rank} failed:\n{failure.text}")
        elif death.exit_code != -signal.SIGKILL:  # a crash in native code often says something
            parts.append(_tail(logs, death.local_rank))
    elif death is not None and death.exit_code == os.EX_TEMPFAIL:
        return f"rank {death.rank} was told to stop; --resume goes on from the last checkpoint"
    elif failure is not None:
        parts.append(f"rank {failure.rank} failed first:\n{failure.text}")
    elif death is not None:
        parts.append(f"rank {death.rank} ended with exit code {death.exit_code}.")
        parts.append(_tail(logs, death.local_rank))
    else:
        parts.append("no rank left a reason; the log says what is known.")
    parts += [folders.way_on(run), f"logs of every rank: {logs[0]}"]
    return "\n".join(part for part in parts if part)


def _tail(logs: Sequence[Path], local_rank: int) -> str:
    for path in _under(logs, f"attempt_*/{local_rank}/stderr.log"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if lines:
            return "\n".join(["The end of what it wrote:", *lines[-TAIL_LINES:]])
    return ""


def _under(folders: Iterable[Path], pattern: str) -> list[Path]:
    """Return the files in the folders that match a pattern, the newest first."""
    found = {path for folder in folders for path in folder.rglob(pattern)}
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)
