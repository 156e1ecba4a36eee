"""Every row of docs/reliability.md's table, tried on the tiny FP16 run; raw outcomes as JSON.

    python tests/faults/trials.py --out docs/benchmarks/raw/faults.json [--only TEXT]

A trial breaks a run, records how it ended, what it said and what it left, and lets it go on with
`--resume`; a run that ends must hold the weights and the metrics of one that nothing happened to. A
trial that is in the file is not made again. Needs root for the small disk.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from tests.faults import tiny_runs  # noqa: E402
from tests.faults.tiny_runs import Ended, folders, real_jobs  # noqa: E402

PHASES = ("rollout", "old_logprobs", "train", "sync", "evaluation", "checkpoint")
LIMIT_S = 20
Outcome = dict[str, Any]


class Bench:
    """Where the trials run, and the run that nothing happens to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.start, self.reference = tiny_runs.prepared(folder)

    def train(self, out: str, *more: str, **options: Any) -> Ended:
        return tiny_runs.train(self.folder, out, self.start, *more, **options)

    def broken(self, name: str, **options: Any) -> Outcome:
        """A run that meets a fault, and goes on."""
        return self.and_on(name, self.train(name, **options))

    def and_on(self, name: str, ended: Ended) -> Outcome:
        """What a broken run did, and what came of it when it went on."""
        resumed = self.train(name, "--resume")
        return {**told(ended), "resumed": self.compared(name, resumed)}

    def compared(self, name: str, ended: Ended) -> Outcome:
        """A run that should have ended like the reference."""
        out = self.folder / name
        if ended.exit_code:
            return told(ended)
        return {
            "exit_code": 0,
            "left": ended.left,
            "same_weights": tiny_runs.final_hash(out) == self.reference["hash"],
            "same_metrics": tiny_runs.measured(out) == self.reference["measured"],
            "said": [
                line for line in ended.text.splitlines() if "resum" in line or "damag" in line
            ],
        }


def told(ended: Ended) -> Outcome:
    """How it ended, and the first lines that give the reason."""
    text = ended.text
    for folder, name in ((tiny_runs.ROOT, "<checkout>"), (sys.base_prefix, "<python>")):
        text = text.replace(str(folder), name)
    lines = [line for line in text.splitlines() if line.strip()]
    marks = (
        "error:",
        "failed first",
        "lost a peer",
        "--resume",
        "was killed",
        "stopped by",
        "took longer than",
        "Error",
    )
    reasons = [line.strip() for line in lines if any(mark in line for mark in marks)]
    return {
        "exit_code": ended.exit_code,
        "seconds": ended.seconds,
        "left": ended.left,
        "said": reasons[:6],
        "tail": lines[-4:],
    }


def fault(phase: str, action: str, rank: int = 1, after_s: float = 0.0) -> dict[str, Any]:
    # Evaluations and checkpoints are numbered by the iterations that are done.
    iteration = 2 if phase in ("evaluation", "checkpoint") else 1
    return {
        "rank": rank, "phase": phase, "iteration": iteration, "after_s": after_s, "action": action,
    }  # fmt: skip


# ---- the trials --------------------------------------------------------------------------


def killed(bench: Bench, name: str, *, phase: str, rank: int, after_s: float) -> Outcome:
    return bench.broken(name, fault=fault(phase, "SIGKILL", rank, after_s))


def torchrun_killed(bench: Bench, name: str) -> Outcome:
    return bench.broken(name, fault=fault("train", "kills_torchrun", 0))


def raised(bench: Bench, name: str) -> Outcome:
    return bench.broken(name, fault=fault("train", "raises"))


def signalled(bench: Bench, name: str, *, number: signal.Signals) -> Outcome:
    def send(job: subprocess.Popen[str]) -> None:
        real_jobs.wait_until(lambda: real_jobs.events(bench.folder / name, "iteration"), job)
        os.killpg(job.pid, number)

    handled = "SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1"
    variables = {"PET_SIGNALS_TO_HANDLE": handled, "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": "120"}
    return bench.broken(name, during=send, variables=variables)


def hung(bench: Bench, name: str, *, action: str, phase: str) -> Outcome:
    limit = {f"watchdog__{phase}_s": LIMIT_S}
    return bench.broken(name, fault=fault(phase, action), **limit)


def disk_full(bench: Bench, name: str) -> Outcome:
    disk = bench.folder / name
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], check=True)
    try:
        ended = bench.train(f"{name}/run")
        subprocess.run(["mount", "-o", "remount,size=1g", str(disk)], check=True)
        return bench.and_on(f"{name}/run", ended)
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def checkpoint_truncated(bench: Bench, name: str) -> Outcome:
    # Checkpoints are written beside the iterations: by the fifth, several are there.
    late = {**fault("sync", "SIGKILL"), "iteration": 4}
    ended = bench.train(name, fault=late, checkpoint__keep=3)
    newest = folders.finished(bench.folder / name)[-1]
    largest = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    os.truncate(largest, largest.stat().st_size // 2)
    return bench.and_on(name, ended)


def metrics_corrupted(bench: Bench, name: str) -> Outcome:
    ended = bench.train(name, fault=fault("sync", "SIGKILL"))
    path = bench.folder / name / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")
    lines[1] = lines[1][: len(lines[1]) // 2] + "\x00" * (len(lines[1]) - len(lines[1]) // 2)
    path.write_text("\n".join(lines), encoding="utf-8")
    return bench.and_on(name, ended)


def not_a_number(bench: Bench, name: str) -> Outcome:
    # Of all ranks: an engine's ranks sample in lockstep, and one alone is another fault.
    both = {**fault("rollout", "nan_logprobs"), "rank": "all"}
    return bench.broken(name, fault=both)


def endless_overflow(bench: Bench, name: str) -> Outcome:
    ended = bench.train(
        name,
        loss_scale__initial="fixed_start",
        loss_scale__initial_scale=2.0**100,
        loss_scale__min_scale=2.0**100,
        train__iterations=40,
    )
    return told(ended)


def wandb_unreachable(bench: Bench, name: str) -> Outcome:
    variables = {
        "WANDB_BASE_URL": "http://127.0.0.1:9", "WANDB_API_KEY": "0" * 40, "WANDB_SILENT": "true",
    }  # fmt: skip
    straight = bench.train(f"{name}-straight", variables=variables, sinks__wandb="online")
    ended = bench.train(
        name, fault=fault("train", "SIGKILL"), variables=variables, sinks__wandb="online"
    )
    # wandb asks its server before it goes on with a run.
    resumed = bench.train(name, "--resume", variables=variables, sinks__wandb="online")
    return {
        **told(ended),
        "itself": bench.compared(f"{name}-straight", straight),
        "resumed": bench.compared(name, resumed),
        "said_of_wandb": [line for line in resumed.text.splitlines() if "Weights & Biases" in line],
    }


def folder_vanishes(bench: Bench, name: str) -> Outcome:
    def remove(job: subprocess.Popen[str]) -> None:
        out = bench.folder / name
        real_jobs.wait_until(lambda: real_jobs.events(out, "iteration"), job)
        shutil.rmtree(out, ignore_errors=True)

    return told(bench.train(name, during=remove))


def same_folder(bench: Bench, name: str) -> Outcome:
    second: list[Outcome] = []

    def start_another(job: subprocess.Popen[str]) -> None:
        out = bench.folder / name
        # Early: a start takes as long as half of the run.
        real_jobs.wait_until((out / "metrics.jsonl").exists, job)
        second.extend(told(bench.train(name, *more)) for more in ((), ("--resume",)))

    first = bench.train(name, during=start_another, train__iterations=tiny_runs.ITERATIONS)
    return {**told(first), "itself": bench.compared(name, first), "others": second}


def trials() -> Iterator[tuple[str, Callable[[Bench, str], Outcome]]]:
    """Name and function of each."""
    for phase in PHASES:
        for rank in (0, 1):
            yield (
                f"rank {rank} killed in {phase}",
                functools.partial(killed, phase=phase, rank=rank, after_s=0.02 * rank),
            )
    yield "torchrun killed", torchrun_killed
    yield "a rank raises", raised
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        yield number.name, functools.partial(signalled, number=number)
    yield "a rank stopped in sync", functools.partial(hung, action="SIGSTOP", phase="sync")
    yield "a rank spins in train", functools.partial(hung, action="spins", phase="train")
    yield "disk full", disk_full
    yield "checkpoint truncated", checkpoint_truncated
    yield "metrics corrupted", metrics_corrupted
    yield "NaN log-probs", not_a_number
    yield "endless overflow", endless_overflow
    yield "W&B unreachable", wandb_unreachable
    yield "run folder vanishes", folder_vanishes
    yield "two runs in one folder", same_folder


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--only", default="", metavar="TEXT", help="trials whose name holds TEXT")
    args = parser.parse_args()
    out = args.out.resolve()
    rows: dict[str, Outcome] = json.loads(out.read_text()) if out.is_file() else {}
    wanted = [(n, trial) for n, trial in trials() if args.only in n and n not in rows]
    if not wanted:
        return
    folder = Path(tempfile.mkdtemp(prefix="fault-trials-"))
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        bench = Bench(folder)
        for number, (name, trial) in enumerate(wanted):
            rows[name] = trial(bench, f"trial{number:02d}")
            out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
            print(name, json.dumps(rows[name], indent=1), flush=True)


if __name__ == "__main__":
    main()
