"""What a job wrote: rank 0's lines while it runs, and the reason when it has failed.

torchrun marks each line with `[default<local rank>]:` and keeps every rank's output in a file of
its own; nemo-run gathers what torchrun printed in `combined.log`, and its standard output alone in
`stdout.log` beside it.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from dataclasses import dataclass
from pathlib import Path

from megatron_precision.platform import process

COMBINED = "combined.log"
POLL_S = 0.2
TAIL_LINES = 25
_MARK = re.compile(r"\[default\d+\]:")
_ROOT_CAUSE = re.compile(
    r"Root Cause \(first observed failure\):.*?"
    r"rank\s*:\s*(\d+) \(local_rank: (\d+)\).*?exitcode\s*:\s*(-?\d+)",
    re.DOTALL,
)


class Follower(contextlib.AbstractContextManager["Follower"]):
    """Prints what the job's first rank writes to its standard output, as it is written.

    Standard error stays in the files: libraries fill it with warnings, and torchrun lists every
    rank there before it comes to the reason, which is shown at the end in any case.
    """

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: the job's log folder, under which the log will appear.
        """
        self._folder = folder
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._follow, daemon=True)

    def __enter__(self) -> Follower:
        self._thread.start()
        return self

    def __exit__(self, *unused: object) -> None:
        self._ended.set()
        self._thread.join()

    def _follow(self) -> None:
        position, rest = 0, ""
        while True:
            ended = self._ended.wait(POLL_S)  # read once more after the end
            combined = next(self._folder.rglob(COMBINED), None)
            if combined is not None:
                with open(
                    combined.with_name("stdout.log"),
                    encoding="utf-8",
                    errors="replace",
                    newline="\n",
                ) as log:
                    log.seek(position)
                    text = rest + log.read()
                    position = log.tell()
                *lines, rest = text.split("\n")
                _show(lines)
            if ended:
                _show([rest])
                return


def _show(lines: list[str]) -> None:
    for line in lines:
        mark = _MARK.match(line)
        if mark:
            print(line[mark.end() :], flush=True)


@dataclass(frozen=True)
class Death:
    """How torchrun saw the first rank end. A negative exit code is a signal's number."""

    rank: int
    local_rank: int
    exit_code: int


def first_death(folder: Path) -> Death | None:
    """What torchrun reported as the root cause in the log under `folder`, if it could."""
    for path in folder.rglob(COMBINED):
        found = _ROOT_CAUSE.search(path.read_text(encoding="utf-8", errors="replace"))
        if found:
            return Death(*map(int, found.groups()))
    return None


def describe_failure(run: Path, logs: Path) -> str:
    """Why a job failed: the rank that was first, and its own words.

    Args:
        run: the folder with `errors/`.
        logs: the job's log folder.
    """
    failure, death = process.first_failure(run), first_death(logs)
    if failure is not None and failure.user_error:
        return failure.text
    parts = [f"{'=' * 30} the job failed {'=' * 30}"]
    # torchrun ends the other ranks with SIGTERM, which is no cause.
    was_killed = death is not None and death.exit_code < 0 and death.exit_code != -signal.SIGTERM
    if death is not None and was_killed:
        name = signal.Signals(-death.exit_code).name
        parts.append(f"rank {death.rank} was killed by {name}; it could leave no traceback.")
        if failure is not None:
            parts.append(f"Then rank {failure.rank} failed:\n{failure.text}")
        elif death.exit_code != -signal.SIGKILL:  # a crash in native code often says something
            parts.append(_tail(logs, death.local_rank))
    elif failure is not None:
        parts.append(f"rank {failure.rank} failed first:\n{failure.text}")
    elif death is not None:
        parts.append(f"rank {death.rank} ended with exit code {death.exit_code}.")
        parts.append(_tail(logs, death.local_rank))
    else:
        parts.append("no rank left a reason; the log says what is known.")
    parts.append(f"logs of every rank: {logs}")
    return "\n".join(part for part in parts if part)


def _tail(logs: Path, local_rank: int) -> str:
    for path in logs.rglob(f"attempt_*/{local_rank}/stderr.log"):
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
        if lines:
            return "\n".join(["The end of what it wrote:", *lines[-TAIL_LINES:]])
    return ""
