"""The tiny FP16 run that the fault trials break: started, resumed, and compared with one unbroken.

Nothing here imports an engine.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
ITERATIONS = 6
# What a run may not have in common with another: how long things took, and how much memory.
OF_THE_MACHINE = ("time/", "memory/", "throughput/", "time_s", "sync/s", "sync/proof_s")


sys.path[:0] = [str(ROOT), str(HERE.parent / "e2e")]

from megatron_precision.checkpoint import folders  # noqa: E402
from megatron_precision.platform import process  # noqa: E402
from tests.e2e import real_jobs  # noqa: E402


@dataclass(frozen=True)
class Ended:
    """How a job ended.

    Attributes:
        text: what it printed, both streams.
        left: processes and shared memory that were there a while after its end.
    """

    exit_code: int
    text: str
    seconds: float
    left: list[str]


def settings(**changed: object) -> list[str]:
    """`--set` words of the tiny run."""
    own = {"train__iterations": ITERATIONS, "checkpoint__every": 1, "eval__every": 2}
    words: list[str] = real_jobs.settings(**{**own, **changed})
    return words


def train(
    folder: Path,
    out: str,
    start: Path,
    *more: str,
    fault: dict[str, Any] | None = None,
    during: Callable[[subprocess.Popen[str]], None] | None = None,
    variables: dict[str, str] | None = None,
    **changed: object,
) -> Ended:
    """Train the tiny FP16 run into `folder / out`, to its end or its fault.

    Args:
        more: further words of the command, such as `--resume`.
        fault: for `inject/sitecustomize.py`.
        during: called once while the job runs.
        variables: of the environment.
        changed: settings, `section__field=value`.
    """
    words = ["train", "sanity.tiny_dense", "--precision", "fp16", "--algo", "PPO", "--out", out]
    words += ["--start-from", str(start), *more, *settings(**changed)]
    environment = {**real_jobs.environment(HERE / "inject"), **(variables or {})}
    if fault is not None:
        environment["FAULT"] = json.dumps(fault)
    began = time.monotonic()
    with subprocess.Popen(
        real_jobs.torchrun_command(2, *words),
        cwd=folder, env=environment, text=True, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    ) as job:  # fmt: skip
        try:
            if during is not None:
                during(job)
            text, _ = job.communicate(timeout=real_jobs.PATIENCE_S)
        except BaseException:
            job.kill()
            raise
    seconds = round(time.monotonic() - began, 1)
    return Ended(job.returncode, text, seconds, left_over(job.pid, out))


def left_over(torchrun: int, out: str, patience_s: float = 20.0) -> list[str]:
    """What a job left: it is named after the torchrun that started it; ranks by their folder."""
    prefix = f"{process.JOB_PREFIX}{torchrun}-"
    variable = f"{process.JOB_VARIABLE}={prefix}".encode()
    deadline = time.monotonic() + patience_s
    while True:
        found = [f"segment {path.name}" for path in process.segments(prefix)]
        found += [f"process {pid}" for pid in real_jobs.processes_with(out)]
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):  # it has just ended
                if variable in (entry / "environ").read_bytes():
                    found.append(f"process {entry.name}")
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.2)


def final_hash(out: Path) -> str:
    """Of the tensors that the last checkpoint holds: weights, main copies, optimizer."""
    last = folders.finished(out)[-1]
    assert int(last.name) == ITERATIONS, f"{out} ended at {last.name}"
    whole = hashlib.sha256()
    for path in sorted(last.glob("*.distcp")):
        whole.update(path.name.encode() + path.read_bytes())
    return whole.hexdigest()[:16]


def measured(out: Path) -> list[dict[str, Any]]:
    """Every step, iteration and evaluation of a run, without what depends on the machine."""
    kinds = ("step", "iteration", "eval")
    events = [e for kind in kinds for e in real_jobs.events(out, kind)]
    return [{k: v for k, v in e.items() if not k.startswith(OF_THE_MACHINE)} for e in events]


def prepared(folder: Path) -> tuple[Path, dict[str, Any]]:
    """A start, and what the run without a fault ends at."""
    if not list((folder / "runs" / "cache").glob("*/start.json")):
        words = ["prepare", "sanity.tiny_dense", *real_jobs.settings()]
        done = real_jobs.torchrun(folder, 2, *words)
        assert done.returncode == 0, done.stdout + done.stderr
    (facts,) = (folder / "runs" / "cache").glob("*/start.json")
    shutil.rmtree(folder / "reference", ignore_errors=True)
    ended = train(folder, "reference", facts.parent)
    assert ended.exit_code == 0, ended.text
    out = folder / "reference"
    return facts.parent, {"hash": final_hash(out), "measured": measured(out)}
