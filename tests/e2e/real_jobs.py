"""Run the project's own commands as a user does, watch their processes, and read what they wrote.

Nothing here imports an engine; metrics are read with plain json.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_precision.platform import process

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 420.0  # for a job to start on a machine that is busy with others

# Sums of three terms: a response has some 15 tokens, and the warm start takes 100 steps.
SMALL = {
    "task.difficulty": "3",
    "task.train_questions": "32",
    "task.eval_questions": "8",
    "perfectible.samples_per_question": "8",
    "warm_start.check_questions": "32",
    "rollout.max_response_tokens": "48",
    "rollout.max_num_seqs": "64",
    "rollout.kv_cache_mib": "32",
    "train.iterations": "2",
    "train.prompts_per_iteration": "8",
    "train.rollouts_per_prompt": "4",
    "train.prompts_per_mini_batch": "4",
    "eval.every": "0",
    "eval.samples_per_question": "1",
}


@dataclass(frozen=True)
class DenseRun:
    """`launch.py sanity.tiny_dense --out run` in `folder`, and its start."""

    folder: Path
    finished: subprocess.CompletedProcess[str]

    @property
    def run(self) -> Path:
        return self.folder / "run"

    @property
    def start(self) -> Path:
        (facts,) = (self.folder / "runs" / "cache").glob("*/start.json")
        return facts.parent


def settings(**changed: object) -> list[str]:
    """`--set` words: the small task, with `section__field=value` changed."""
    values = SMALL | {name.replace("__", "."): str(value) for name, value in changed.items()}
    return ["--set", *(f"{name}={value}" for name, value in values.items())]


def environment(*python_path: Path) -> dict[str, str]:
    """A user's environment: nothing that another job or test has left in it."""
    ours = ("NEMORUN_HOME", "RANK", "WORLD_SIZE", "LOCAL_RANK", process.JOB_VARIABLE)
    kept = {name: value for name, value in os.environ.items() if name not in ours}
    paths = os.pathsep.join(map(str, (*python_path, ROOT)))
    # torchrun prints a banner where nobody has chosen the number of threads.
    return {**kept, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def launch_command(*words: str) -> list[str]:
    return [sys.executable, str(ROOT / "launch.py"), *words]


def torchrun_command(ranks: int, *words: str) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*torchrun, "--nproc-per-node", str(ranks), *module_words(*words)]


def module_words(*words: str) -> list[str]:
    return ["-m", "megatron_precision", *words]


def run(
    command: list[str], folder: Path, timeout_s: float = PATIENCE_S
) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder` to its end; a job that takes too long is told to stop."""
    with started(command, folder) as job:
        try:
            stdout, stderr = job.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            job.terminate()
            stdout, stderr = job.communicate(timeout=60)
            raise AssertionError(f"no end within {timeout_s} s:\n{stdout}\n{stderr}") from None
    return subprocess.CompletedProcess(command, job.returncode, stdout, stderr)


def launch(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return run(launch_command(*words), folder)


def torchrun(folder: Path, ranks: int, *words: str) -> subprocess.CompletedProcess[str]:
    return run(torchrun_command(ranks, *words), folder)


@contextmanager
def started(
    command: list[str], folder: Path, python_path: tuple[Path, ...] = ()
) -> Iterator[subprocess.Popen[str]]:
    """A running command in a process group of its own; it is told to stop if the test fails."""
    job = subprocess.Popen(
        command,
        cwd=folder,
        env=environment(*python_path),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield job
    finally:
        if job.poll() is None:
            job.terminate()
            try:
                job.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                job.kill()
                job.communicate()


def wait_until(
    happened: Callable[[], Any], job: subprocess.Popen[str], timeout_s: float = PATIENCE_S
) -> Any:
    """What `happened` returns as soon as that is true of a job that still runs."""
    deadline = time.monotonic() + timeout_s
    while not (found := happened()):
        if job.poll() is not None:
            stdout, stderr = job.communicate()
            raise AssertionError(f"the job ended with {job.returncode}:\n{stdout}\n{stderr}")
        assert time.monotonic() < deadline, f"waited {timeout_s} s in vain"
        time.sleep(0.1)
    return found


@dataclass(frozen=True)
class Ranks:
    """A living job: its id, the process id of each rank, and the shared memory they have mapped.

    Python's own segments (`psm_...`) are known by the mapping alone; their names name no job.
    """

    job: str
    pids: dict[int, int]
    mapped: frozenset[Path]


def find_ranks(out: Path, count: int = 2) -> Ranks | None:
    """The ranks that train into `out`, found by their command line; None until all are there."""
    pids: dict[int, int] = {}
    job = ""
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().decode(errors="replace").split("\0")
            variables = (entry / "environ").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has just ended, or is another user's
            continue
        values = dict(line.split("=", 1) for line in variables if "=" in line)
        if "megatron_precision" in words and str(out) in words and "RANK" in values:
            pids[int(values["RANK"])] = int(entry.name)
            job = values.get(process.JOB_VARIABLE, "")
    return Ranks(job, pids, _mapped(pids.values())) if len(pids) == count else None


def kill_all(job: subprocess.Popen[str], ranks: Ranks) -> None:
    """As a power cut: torchrun and every rank, without a last word."""
    for pid in (job.pid, *ranks.pids.values()):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    job.communicate(timeout=60)


def _mapped(pids: Iterable[int]) -> frozenset[Path]:
    found = set()
    for pid in pids:
        with suppress(OSError):  # it has just ended
            for line in Path(f"/proc/{pid}/maps").read_text(encoding="utf-8").splitlines():
                path = line.rpartition(" ")[2]
                if path.startswith(f"{process.SHARED_MEMORY}/"):
                    found.add(Path(path))
    return frozenset(found)


def processes_with(word: str) -> list[int]:
    """Process ids of the commands that have `word` among their arguments."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):  # it has just ended
            if word.encode() in (entry / "cmdline").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def events(out: Path, kind: str) -> list[dict[str, Any]]:
    """Whole events of one kind in `out/metrics.jsonl`; half a last line is no event."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")
    # What follows the last newline is empty, or the line that was being written.
    found = [json.loads(line) for line in lines[:-1]]
    return [event for event in found if event["event"] == kind]


def assert_nothing_left(ranks: Ranks) -> None:
    """No process of the job, no segment with its name, and none that its ranks had mapped."""
    if ranks.job:
        assert process.members(ranks.job) == []
        assert process.segments(ranks.job) == []
    else:  # by hand: the ranks make the name up, and it is not in their first environment
        assert [pid for pid in ranks.pids.values() if Path(f"/proc/{pid}").exists()] == []
    assert [path for path in ranks.mapped if path.exists()] == []
