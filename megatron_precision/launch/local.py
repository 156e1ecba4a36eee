"""Runs a job on this machine with nemo-run's local executor.

nemo-run leaves the rest to its caller, and this module does it: the exit code, signals, the
console, the traceback of the rank that failed first, and cleaning up after a killed job.
"""

from __future__ import annotations

import contextlib
import fcntl
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from megatron_precision.checkpoint import run_folder
from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.schema import RunConfig
from megatron_precision.launch.jobs import (
    Job,
    environment,
    load,
    open_experiment,
    prepare_job,
    python_path,
    require_plain,
)
from megatron_precision.launch.log import Follower, describe_failure
from megatron_precision.platform import process


def ensure_start(config: RunConfig) -> int:
    """Make the supervised start that a run trains from, unless the cache has it.

    Returns:
        0 if the cache has the start now, otherwise the exit code of the job that failed to make it.
    """
    from megatron_precision.data import start

    path = start.start_dir(config)
    if start.start_is_complete(path):
        return 0
    job = prepare_job(config, path)
    job.folder.mkdir(parents=True, exist_ok=True)
    # Two runs that need the same start make it once: the second one waits for the lock.
    with open(job.folder / "lock", "w", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if start.start_is_complete(path):
            return 0
        print(f"preparing the start of {config.recipe} in {path}", flush=True)
        shutil.rmtree(job.folder / run_folder.ERRORS, ignore_errors=True)
        run_folder.write_config(config, job.folder)
        return run_job(job)


def run_job(job: Job) -> int:
    """Run a job to its end and print rank 0's lines as they come.

    When it returns, all of the job's processes have ended and its shared memory is removed.

    Returns:
        0 if the job succeeded, 2 for a user error, 128 + n if signal n stopped this process, and
        1 for any other failure.

    Raises:
        UserError: if nemo-run's launcher would garble an argument of the job.
    """
    require_plain(job.command_line, f"torchrun -m megatron_precision {job.command}")
    job_id = process.new_job_id()
    guard = process.Guard(job_id)
    try:
        succeeded, signal_number, log_folder = _run_in_nemo(job, job_id)
    finally:
        guard.close()
    if signal_number:
        print(f"stopped by {signal.Signals(signal_number).name}", file=sys.stderr, flush=True)
        return 128 + signal_number
    if succeeded:
        return 0
    failure = process.first_failure(job.folder)
    print(describe_failure(job.folder, log_folder), file=sys.stderr, flush=True)
    return 2 if failure is not None and failure.user_error else 1


def _run_in_nemo(job: Job, job_id: str) -> tuple[bool, int, Path]:
    """Return whether the job succeeded, the signal that stopped it (or 0), and its log folder."""
    home = job.folder / "launcher"
    nemo_run = load(home)
    from torchx.schedulers.local_scheduler import SignalException

    executor = nemo_run.LocalExecutor(
        ntasks_per_node=job.ranks, launcher="torchrun", env_vars=_job_environment(job, job_id)
    )
    script = nemo_run.Script(path=job.module, args=job.command_line, entrypoint="python", m=True)
    experiment = open_experiment(nemo_run, job.command, executor, home)
    with _Stop(job_id) as stop:
        try:
            with experiment:
                name = experiment.add(script, name=job.command)
                logs = Path(experiment.jobs[0].executor.job_dir)
                with Follower(logs):
                    experiment.run()
                    # Not earlier: torchx installs its own handlers while it starts the job.
                    stop.install(lambda: experiment.cancel(name))
                    experiment._wait_for_jobs(experiment.jobs)
        except SignalException as stopped:
            stop.number = int(stopped.sigval)
    return str(experiment.jobs[0].state) == "SUCCEEDED", stop.number, logs


def _job_environment(job: Job, job_id: str) -> dict[str, str]:
    return {
        **environment(job.ranks),
        process.JOB_VARIABLE: job_id,
        "PATH": str(Path(sys.executable).parent),  # nemo-run prepends it to the user's PATH
        "PYTHONPATH": python_path(),
        "COLUMNS": str(shutil.get_terminal_size((120, 24)).columns),
        "LOGLEVEL": "WARNING",
        # torchrun prints rank 0 on the console and writes every rank to a file.
        "PET_LOCAL_RANKS_FILTER": "0",
        "PET_LOCAL_ADDR": "127.0.0.1",
    }


class _Stop(contextlib.AbstractContextManager["_Stop"]):
    """Cancels the job on SIGINT, SIGTERM or SIGHUP, and remembers which signal came."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self, job_id: str) -> None:
        self.number = 0
        self._job_id = job_id
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> _Stop:
        self._previous = {number: signal.getsignal(number) for number in self.SIGNALS}
        return self

    def install(self, cancel: Any) -> None:
        def handle(number: int, frame: FrameType | None) -> None:
            if self.number:  # a second signal: do not wait any longer
                process.end_job(self._job_id, grace_s=0.0)
                return
            self.number = number
            cancel()

        for number in self.SIGNALS:
            signal.signal(number, handle)

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Lock the file `path` while the block runs.

    Raises:
        UserError: if another process has locked it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", encoding="ascii") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as held:
            raise UserError(
                Problem(
                    "another run is writing there",
                    str(path.with_suffix("")),
                    "a lock that is held",
                    "a folder that no other run uses",
                    "wait for it, or choose another --out",
                )
            ) from held
        yield


def elapsed(since_s: float) -> str:
    """Format the time since `since_s`, a value of `time.monotonic()`, as minutes and seconds."""
    minutes, seconds = divmod(round(time.monotonic() - since_s), 60)
    return f"{minutes} min {seconds:02d} s"
