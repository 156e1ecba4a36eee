"""An RL iteration on SmolLM2-135M in BF16, beside TRL's GRPOTrainer in the same run.

    .venv/bin/python benchmarks/bench_smollm2.py --out docs/benchmarks/raw/smollm2.json --trl PYTHON

PYTHON is the interpreter of an environment with trl (benchmarks/bench_speed.py says how).
Both sides sample 64 responses of 64 tokens (16 prompts × 4, none ends early), train on them in four
micro-batches and take one AdamW step. Systems take turns, so that a machine whose speed drifts
treats them alike; the first iteration of each turn is left out, unless it is the only one.

A CPU without AVX-512 BF16 has no BF16 arithmetic. PyTorch's own products of BF16, which TRL uses,
are some ten times slower there than those of FP32 (an iteration of half an hour), while our side
multiplies widened operands. TRL in FP32 is then the fairer measure, and one iteration of TRL in
BF16 will do:

    ... --rounds 1 --systems dp2 trl-fp32 trl-bf16:1 dp2 trl-fp32
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PHASES = ("rollout", "reward", "old_logprobs", "train", "sync", "other", "iteration")
WORK = {
    "start.kind": "checkpoint",
    "task.name": "chat",
    "task.max_prompt_tokens": 64,
    "task.scorer": "smollm2_work:score",
    "task.scorer_workers": 1,
    "rollout.max_response_tokens": 64,
    "rollout.max_num_seqs": 64,
    "algo.name": "PPO",
    "optimizer.learning_rate": 1e-6,
    "parallel.tp_size": 1,
    "parallel.rollout_tp_size": 1,
    "train.prompts_per_iteration": 16,
    "train.rollouts_per_prompt": 4,
    "train.prompts_per_mini_batch": 16,
    "train.micro_batch_size": 16,
    "eval.every": 0,
    "eval.samples_per_question": 1,
}
# Processes, threads in each, settings. Its 9 heads and 3 KV heads do not divide by TP = 2.
SYSTEMS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "dp2": (2, 1, {"parallel.world_size": 2}),
    "one": (1, 2, {"parallel.world_size": 1}),
}
# FP32 is what TRL is fastest in on a CPU without BF16 arithmetic (AVX-512 BF16 or AMX).
TRL: dict[str, list[str]] = {
    "trl-bf16": ["--precision", "bf16"],
    "trl-autocast": ["--precision", "autocast"],
    "trl-fp32": ["--precision", "fp32"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trl", type=Path, help="interpreter of an environment with trl")
    parser.add_argument("--work", type=Path, help="a folder made by benchmarks/smollm2_work.py")
    parser.add_argument(
        "--systems",
        nargs="+",
        default=["dp2", "one", "trl-bf16", "trl-autocast"],
        metavar="NAME[:ITERATIONS]",
        help=f"in turns, from {', '.join([*SYSTEMS, *TRL])}",
    )
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument(
        "--iterations", type=int, default=4, help="of each turn, the first included"
    )
    args = parser.parse_args()
    turns = [word.partition(":")[::2] for word in args.systems]
    if unknown := {name for name, _ in turns} - {*SYSTEMS, *TRL}:
        parser.error(f"unknown systems {sorted(unknown)}; there are {[*SYSTEMS, *TRL]}")
    with tempfile.TemporaryDirectory() as made:
        work = args.work.resolve() if args.work else Path(made)
        if not args.work:
            script = str(ROOT / "scripts" / "smollm2_work.py")
            subprocess.run([sys.executable, script, str(work)], check=True)
        samples: dict[str, list[dict[str, float]]] = {}
        for number in range(args.rounds):
            for name, own in turns:
                iterations = int(own or args.iterations)
                if name in SYSTEMS:
                    found = _ours(*SYSTEMS[name], work, iterations)
                elif args.trl:
                    found = _trl(args.trl, TRL[name], work, iterations)
                else:
                    continue
                samples.setdefault(name, []).extend(found)
                _write(args.out, samples)
                print(f"round {number + 1}: {name} {_medians(found)}", flush=True)


def _write(out: Path, samples: dict[str, list[dict[str, float]]]) -> None:
    """Write what there is so far: a run that is cut short keeps its finished systems."""
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "command": shlex.join(["benchmarks/bench_smollm2.py", *sys.argv[1:]]),
        "cores": len(os.sched_getaffinity(0)),
        "bf16_arithmetic": "avx512_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8"),
        "load_average": os.getloadavg(),
        "medians": {name: _medians(rows) for name, rows in samples.items()},
        "samples": samples,
    }
    out.write_text(json.dumps(report, indent=1), encoding="utf-8")


def _ours(
    processes: int, threads: int, layout: dict[str, Any], work: Path, iterations: int
) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        prompts = str(work / "prompts.jsonl")
        values = (
            WORK
            | layout
            | {
                "train.iterations": iterations,
                "task.train_sets": f"topics={prompts}",
                "task.eval_sets": f"topics={prompts}",
            }
        )
        words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        words += ["--nproc-per-node", str(processes), "-m", "megatron_precision", "train"]
        words += ["sanity.tiny_dense", "--precision", "bf16", "--model", str(work / "model")]
        words += [
            "--out",
            str(out),
            "--set",
            *(f"{name}={value}" for name, value in values.items()),
        ]
        path = os.pathsep.join([str(ROOT), str(ROOT / "scripts")])
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    rows = []
    for event in _counted([e for e in events if e["event"] == "iteration"]):
        assert event["response/tokens_mean"] == 64, "a response ended early"
        rows.append({phase: float(event[f"time/{phase}_s"]) for phase in PHASES})
    return rows


def _trl(python: Path, options: list[str], work: Path, iterations: int) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        script = str(ROOT / "scripts" / "bench_trl_smollm2.py")
        words = ["--work", str(work), "--iterations", str(iterations), "--out", folder, *options]
        environment = os.environ | {"OMP_NUM_THREADS": "2"}
        done = subprocess.run(
            [str(python), script, *words], capture_output=True, text=True, env=environment
        )
        if done.returncode:
            sys.exit(done.stdout + done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert set(found["tokens"]) == {64 * 64}, "a response ended early"
    return [{"iteration": seconds} for seconds in _counted(found["seconds"])]


def _counted(iterations: list[Any]) -> list[Any]:
    return iterations[1:] or iterations


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: round(statistics.median(row[key] for row in rows), 3) for key in rows[0]}


if __name__ == "__main__":
    main()
