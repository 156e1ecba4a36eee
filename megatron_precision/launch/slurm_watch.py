"""Follows a Slurm job to its end: prints its state and rank 0's lines, and returns its exit code.

nemo-run asks only `sacct`, which needs a cluster with accounting, and reads no exit code. This
module asks the controller (`scontrol`), and `sacct` after the controller has forgotten the job.
"""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import FrameType

from megatron_precision.launch import log
from megatron_precision.launch.slurm import Submitted, rank_logs
from megatron_precision.platform import process

POLL_S = 2.0
# Slurm may queue a failed job again within this time.
SETTLE_S = 4.0
_ENDED = frozenset(
    {"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY",
     "PREEMPTED", "REVOKED", "TIMEOUT"}
)  # fmt: skip
_FORGOTTEN = "FORGOTTEN"
_NO_TASK = 2**32 - 2


@dataclass(frozen=True)
class State:
    """The state of a Slurm job; of an array, the state of the task that `telling` chooses.

    Attributes:
        name: Slurm's name of the state.
        exit_code: the batch script's exit code.
        restarts: how often the job was queued again, plus the number of earlier tasks of its array.
        reason: why the job waits.
    """

    name: str
    exit_code: int = 0
    restarts: int = 0
    reason: str = ""

    @property
    def ended(self) -> bool:
        """Whether the job has ended or Slurm has forgotten it."""
        return self.name in _ENDED or self.name == _FORGOTTEN


def state(number: str) -> State:
    """Ask Slurm for the state of a job."""
    done = subprocess.run(
        ["scontrol", "-o", "show", "job", number], capture_output=True, text=True, check=False
    )
    if done.returncode == 0:
        return of_record(telling(done.stdout.splitlines()))
    if "Invalid job id" not in done.stderr:
        return State("UNKNOWN", reason=done.stderr.strip())
    return _from_accounting(number)


def of_record(record: str) -> State:
    """Parse a line of `scontrol -o show job`."""
    found = _fields(record)
    code = int(found["ExitCode"].partition(":")[0])
    # Waiting tasks share one record with a range (2-3%1), which has no number once cancelled.
    task = int(re.match(r"\d+", found.get("ArrayTaskId", "1"))[0])  # type: ignore[index]
    before = task - 1 if task < _NO_TASK else 0
    return State(found["JobState"], code, before + int(found["Restarts"]), found["Reason"])


def telling(records: Sequence[str]) -> str:
    """Choose the record that describes the state of an array from the records of its tasks.

    Tasks run one at a time. The choice is the running task, otherwise a waiting one, otherwise the
    last task that ran: later tasks were not needed and are cancelled.
    """

    def order(record: str) -> tuple[bool, bool, bool, str]:
        found = _fields(record)
        alive = found["JobState"] not in _ENDED
        ran = found.get("NodeList", "(null)") != "(null)"
        return alive, alive and found["JobState"] != "PENDING", ran, found.get("EndTime", "")

    return max((record for record in records if record.strip()), key=order)


def _fields(record: str) -> dict[str, str]:
    """Return the fields of a record that this module uses; fields without a value are left out."""
    names = "JobState|ExitCode|Restarts|Reason|ArrayTaskId|NodeList|EndTime"
    return dict(re.findall(rf"\b({names})=(\S+)", record))


def _from_accounting(number: str) -> State:
    try:
        done = subprocess.run(
            ["sacct", "-n", "-P", "-X", "-j", number, "-o", "State,ExitCode"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except FileNotFoundError:
        return State(_FORGOTTEN)
    found = [line.split("|") for line in done.stdout.splitlines()]
    states = [State(f[0].split()[0], int(f[1].partition(":")[0])) for f in found if len(f) == 2]
    # Tasks of an array that were not needed are cancelled; they say nothing about the run.
    ran = [state for state in states if state.name != "CANCELLED"] or states
    completed = [state for state in ran if state.name == "COMPLETED"]
    return (completed or ran or [State(_FORGOTTEN)])[-1]


def wait(jobs: Sequence[Submitted]) -> int:
    """Wait for a chain of jobs to end, and print the lines of each job's first rank.

    SIGINT and SIGTERM cancel the jobs; SIGHUP lets them continue.

    Returns:
        0 if all jobs succeeded. For the first job that did not: 2 for a user error, 143 if it was
        cancelled, otherwise 1. 128 + n if signal n stopped this process.
    """
    with _Stop(jobs) as stop:
        for submitted in jobs:
            end = _follow(submitted, stop)
            if stop.number:
                print(stop.words(), file=sys.stderr, flush=True)
                return 128 + stop.number
            if end.name != "COMPLETED":
                _cancel([job.number for job in jobs])
                return _explain(submitted, end)
    return 0


def _follow(submitted: Submitted, stop: _Stop) -> State:
    lines = log.Lines(submitted.outputs)
    shown, ended_s = "", None
    while True:
        now = state(submitted.number)
        lines.show()
        text = _describe(submitted.number, now)
        if text != shown:
            print(text, flush=True)
            shown = text
        if now.ended:
            ended_s = ended_s or time.monotonic()
            if now.name in ("COMPLETED", _FORGOTTEN) or time.monotonic() - ended_s > SETTLE_S:
                lines.show(last=True)
                return now
        else:
            ended_s = None
        if stop.is_impatient():
            return now
        stop.pause()


def _describe(number: str, now: State) -> str:
    why = f" ({now.reason})" if now.name == "PENDING" and now.reason != "None" else ""
    again = f", start {now.restarts + 1}" if now.restarts else ""
    return f"slurm job {number}: {now.name.lower()}{why}{again}"


def _explain(submitted: Submitted, end: State) -> int:
    """Print why a job ended, and return this process's exit code."""
    job = submitted.job
    number = f"slurm job {submitted.number}"
    failure = process.first_failure(job.folder)
    if end.name == "CANCELLED":
        print(f"{number} was cancelled; logs: {submitted.logs}", file=sys.stderr, flush=True)
        return 128 + signal.SIGTERM
    if end.name == "TIMEOUT":
        print(
            f"{number} was at its time limit; --restarts N lets it go on from its last checkpoint, "
            "as --array N does where jobs may not be queued again",
            file=sys.stderr,
        )
    elif end.name not in ("FAILED", _FORGOTTEN):
        print(f"{number} ended as {end.name}", file=sys.stderr)
    if end.name in ("FAILED", _FORGOTTEN) or failure is not None:
        text = log.describe_failure(job.folder, rank_logs(job), submitted.logs)
        print(text, file=sys.stderr, flush=True)
    return 2 if failure is not None and failure.user_error else 1


def _cancel(numbers: Sequence[str]) -> None:
    subprocess.run(["scancel", *numbers], capture_output=True, check=False)


class _Stop:
    """Cancels the jobs on SIGINT or SIGTERM, and remembers which signal came."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    PATIENCE_S = 90.0

    def __init__(self, jobs: Sequence[Submitted]) -> None:
        self.number = 0
        self._numbers = [job.number for job in jobs]
        self._since_s = 0.0

    def __enter__(self) -> _Stop:
        self._previous = {number: signal.getsignal(number) for number in self.SIGNALS}
        for number in self.SIGNALS:
            signal.signal(number, self._handle)
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        asked_before = self.number
        self.number = number
        self._since_s = 0.0 if asked_before else time.monotonic()
        if number != signal.SIGHUP and not asked_before:
            _cancel(self._numbers)

    def is_impatient(self) -> bool:
        """Whether to stop waiting for the jobs to end."""
        late = time.monotonic() - self._since_s > self.PATIENCE_S
        return self.number == signal.SIGHUP or (self.number != 0 and late)

    def words(self) -> str:
        name = signal.Signals(self.number).name
        jobs = ", ".join(self._numbers)
        if self.number == signal.SIGHUP:
            return f"stopped by {name}; slurm jobs run on: {jobs}"
        return f"stopped by {name}; cancelled slurm jobs: {jobs}"

    @staticmethod
    def pause() -> None:
        """Sleep until the next look at the job; signal handlers run meanwhile."""
        time.sleep(POLL_S)
