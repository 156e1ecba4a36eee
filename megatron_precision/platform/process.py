"""Finds a job's processes, ends them together, and reports what the first one to fail said.

A job is one `torchrun` world. Its id is in the environment of each of its processes and in the name
of each of its shared-memory segments, so they can be found after any kind of death, and another
job's are never touched.

Run as `python -m megatron_precision.platform.process JOB`, this module is a guard: it waits until
its standard input closes, which the kernel does when its owner ends, and then ends the job's
processes and removes its segments. It imports neither torch nor an engine.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from megatron_precision.config.errors import UserError

JOB_VARIABLE = "MEGATRON_PRECISION_JOB"
SHARED_MEMORY = Path("/dev/shm")
JOB_PREFIX = "mpjob-"
_JOB_IN_NAME = re.compile(re.escape(JOB_PREFIX) + r"(\d+-\d+|[0-9a-f]+)")
TRACKER_GRACE_S = 3.0
_PR_SET_PDEATHSIG = 1
_WATCHING = b"watching\n"


def new_job_id() -> str:
    """Make a name that no other job has, on this machine or another."""
    return JOB_PREFIX + secrets.token_hex(6)


def adopt_job() -> str:
    """Return this process's job id; make one up if no launcher gave one.

    Under a hand-typed `torchrun` the ranks of one machine share a parent and nothing else that
    is unique; its process id and start time name the job, and segments are per machine too.
    """
    job = os.environ.get(JOB_VARIABLE)
    if not job:
        parent = os.getppid()
        job = f"{JOB_PREFIX}{parent}-{_start_ticks(parent)}"
        os.environ[JOB_VARIABLE] = job
    return job


def is_launchers(job: str) -> bool:
    """Say whether a launcher gave the job its id, and shows its failures."""
    return "-" not in job.removeprefix(JOB_PREFIX)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when its parent ends, so that no rank is orphaned.

    torchrun passes signals on, but a killed torchrun cannot.
    """
    parent = os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # it ended before the request took hold
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Failure:
    """The failure that a rank recorded.

    Attributes:
        rank: its global rank.
        time_s: when, in seconds since the epoch.
        user_error: whether it is the user's mistake, which needs no traceback.
        text: the traceback, or the message of a user error.
    """

    rank: int
    time_s: float
    user_error: bool
    text: str


def record_failure(out: Path, rank: int, error: BaseException) -> Path:
    """Write a rank's error to `<out>/errors/rank<rank>.txt`, for `first_failure`.

    Returns:
        The file, which holds a line for us and the traceback for the reader.
    """
    user_error = isinstance(error, UserError)
    text = str(error) if user_error else "".join(traceback.format_exception(error))
    path = out / "errors" / f"rank{rank}.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "user" if user_error else "crash"
    path.write_text(f"rank {rank} time_s {time.time():.6f} kind {kind}\n{text}", encoding="utf-8")
    return path


def first_failure(out: Path) -> Failure | None:
    """Return the earliest failure recorded under `out`, or None.

    The rank that broke is earlier than the peers whose collective broke because of it.
    """
    failures = []
    for path in (out / "errors").glob("rank*.txt"):
        head, _, text = path.read_text(encoding="utf-8").partition("\n")
        words = head.split()
        # A rank that is killed while it writes leaves half a line, and the peers' own files.
        if len(words) == 6:
            failures.append(Failure(int(words[1]), float(words[3]), words[5] == "user", text))
    return min(failures, key=lambda failure: failure.time_s, default=None)


def members(job: str) -> list[int]:
    """List the process ids of the job's living processes, except this one."""
    wanted = f"{JOB_VARIABLE}={job}".encode()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        # A process of another user, or one that has just ended, cannot be read.
        with contextlib.suppress(OSError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid()]


def segments(job: str = JOB_PREFIX) -> list[Path]:
    """List the shared-memory segments of the job, or of every job of this project."""
    return sorted(path for path in SHARED_MEMORY.glob("*") if job in path.name)


def is_alive(job: str) -> bool:
    """Say whether a process of the job, or the `torchrun` that named it, is running."""
    parent, dash, ticks = job.removeprefix(JOB_PREFIX).partition("-")
    if dash:
        return Path(f"/proc/{parent}").exists() and _start_ticks(int(parent)) == ticks
    return bool(members(job))


def job_of(segment: Path) -> str:
    """Read a segment's job from its name."""
    found = _JOB_IN_NAME.search(segment.name)
    assert found is not None, f"{segment} is no segment of this project"
    return found[0]


def end_job(job: str, grace_s: float = 5.0) -> list[int]:
    """End the processes that are left of a job, and remove its shared memory.

    Args:
        job: its id.
        grace_s: seconds between SIGTERM and SIGKILL.

    Returns:
        The processes that were still alive.
    """
    # First, since whoever ends us has little patience: what is mapped stays mapped. And again at
    # the end, for what was made in between.
    _remove_segments(job)
    left = members(job)
    _signal(left, signal.SIGTERM)
    deadline = time.monotonic() + grace_s
    while members(job) and time.monotonic() < deadline:
        time.sleep(0.1)
    # Killing torchrun can let a rank start another process in between: look until none is left.
    # Python's resource trackers remove the segments of the processes that they survive, by
    # themselves and in no time, so they are given theirs.
    deadline = time.monotonic() + TRACKER_GRACE_S
    while alive := members(job):
        trackers = [pid for pid in alive if _is_resource_tracker(pid)]
        patient = time.monotonic() < deadline
        _signal([pid for pid in alive if not (patient and pid in trackers)], signal.SIGKILL)
        time.sleep(0.1)
    _remove_segments(job)
    return left


class Guard:
    """Ends a job when this process ends, even by SIGKILL; `close` does it at once."""

    def __init__(self, job: str) -> None:
        """
        Args:
            job: the id of the job to watch over.
        """
        environment = {key: value for key, value in os.environ.items() if key != JOB_VARIABLE}
        # A session of its own: Ctrl-C in the terminal must not reach it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, job],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            cwd=Path(__file__).resolve().parents[2],
            start_new_session=True,
        )
        # What the job's processes make is guarded from the first: a Slurm step whose torchrun has
        # ended is killed, with a guard that is still importing. An empty line: it could not start.
        assert self._process.stdout is not None
        if self._process.stdout.readline() != _WATCHING:
            raise OSError(f"the guard of {job} could not start: exit code {self._process.wait()}")
        self._process.stdout.close()

    def close(self) -> None:
        """End the processes that are left of the job, and wait until they are gone."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def main() -> None:
    """Run the guard's process."""
    # Slurm sends a job's signal to every process of it; this one has its work when they end.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.write(sys.stdout.fileno(), _WATCHING)
    sys.stdin.buffer.read()
    end_job(sys.argv[1])


def _remove_segments(job: str) -> None:
    for path in segments(job):
        with contextlib.suppress(FileNotFoundError):
            path.unlink()


def _signal(pids: list[int], number: signal.Signals) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _is_resource_tracker(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"multiprocessing.resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _start_ticks(pid: int) -> str:
    """Return a process's start in clock ticks since boot, to detect reused process ids."""
    stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    # The command's name, in brackets, may hold spaces; field 22 is counted from behind it.
    return stat.rpartition(")")[2].split()[19]


if __name__ == "__main__":
    main()
