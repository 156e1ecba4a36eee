"""Random kills of the tiny run: every one is resumed, and every run must end at the same weights.

    python tests/faults/random_kills.py --kills 100 --out docs/benchmarks/raw/random_kills.jsonl

A reference run goes through without a fault. Then runs of the same configuration are killed up to
five times each, at a phase, an iteration, a process and a moment that the kill's seed decides, and
gone on with `--resume`. Checkpoints are written while training goes on, so that one is there an
iteration after it was begun: faults are drawn up to three iterations ahead, and most kills find
something to go on from. A fault whose phase did not come again is no kill and has no row. One row
a kill, with what the run that it belongs to ended at. Interrupted, the same command goes on where
it was. Takes some 30 seconds a kill on two idle cores.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
KILLS_A_RUN = 5
PHASES = ("start", "rollout", "old_logprobs", "train", "sync", "evaluation", "checkpoint", "other")
# torchrun is its ranks' parent; a kill of it reaches them by the parent-death signal.
VICTIMS = ("rank 0", "rank 1", "torchrun")


sys.path.insert(0, str(HERE))

from tests.faults import tiny_runs  # noqa: E402
from tests.faults.tiny_runs import folders  # noqa: E402


def chosen(seed: int, resumed_at: int) -> dict[str, Any]:
    """The fault of a seed, somewhere in the iterations that are left."""
    dice = random.Random(f"kill {seed}")
    phase, victim = dice.choice(PHASES), dice.choice(VICTIMS)
    iteration = min(tiny_runs.ITERATIONS - 1, resumed_at + dice.choice((0, 1, 1, 2, 2, 3)))
    if phase == "start":
        iteration = 0
    return {
        "rank": 1 if victim == "rank 1" else 0,
        "phase": phase,
        "iteration": iteration,
        "after_s": dice.choice((0.0, round(dice.uniform(0.0, 0.4), 3))),
        "action": "kills_torchrun" if victim == "torchrun" else "SIGKILL",
    }


def one_run(number: int, folder: Path, start: Path, reference: dict[str, Any]) -> list[dict]:
    """A run that is killed five times and then ends; a row for each kill."""
    name = f"killed{number:03d}"
    out, rows = folder / name, []
    shutil.rmtree(out, ignore_errors=True)
    for kill in range(KILLS_A_RUN):
        seed = number * KILLS_A_RUN + kill
        done = [int(p.name) for p in folders.finished(out)]
        fault = chosen(seed, max(done, default=0))
        more = ["--resume"] if out.exists() else []
        ended = tiny_runs.train(folder, name, start, *more, fault=fault)
        if ended.exit_code == 0:
            break
        rows.append(
            {
                "seed": seed, "run": name, **fault,
                "resumed_at": max(done, default=0), "exit_code": ended.exit_code,
                "seconds": ended.seconds, "left": ended.left,
            }
        )  # fmt: skip
    ended = tiny_runs.train(folder, name, start, "--resume")
    assert ended.exit_code == 0, ended.text
    result = {
        "final_hash": tiny_runs.final_hash(out),
        "same_metrics": tiny_runs.measured(out) == reference["measured"],
    }
    shutil.rmtree(out)
    return [
        {**row, **result, "same_weights": result["final_hash"] == reference["hash"]} for row in rows
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument("--first", type=int, default=0, metavar="N", help="of the runs' numbers")
    parser.add_argument("--work", type=Path, help="folder of the runs; default: a temporary one")
    args = parser.parse_args()
    out = args.out.resolve()
    known = out.read_text(encoding="utf-8").splitlines() if out.is_file() else []
    runs_done = {json.loads(line)["run"] for line in known}
    kills = len(known)
    folder = (args.work or Path(tempfile.mkdtemp(prefix="random-kills-"))).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    start, reference = tiny_runs.prepared(folder)
    for number in itertools.count(args.first):
        if kills >= args.kills:
            break
        if f"killed{number:03d}" in runs_done:
            continue
        rows = one_run(number, folder, start, reference)
        with out.open("a", encoding="utf-8") as lines:
            lines.writelines(json.dumps(row) + "\n" for row in rows)
        good = all(row["same_weights"] and row["same_metrics"] and not row["left"] for row in rows)
        kills += len(rows)
        print(
            f"{kills} kills of {args.kills}, run {number}: {'as the reference' if good else rows}",
            flush=True,
        )


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
