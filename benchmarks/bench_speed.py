"""Seconds of an iteration, by precision and layout, beside TRL's GRPOTrainer in the same run.

    .venv/bin/python benchmarks/bench_speed.py --out docs/benchmarks/raw/speed.json [--trl PYTHON]

PYTHON is the interpreter of an environment with trl, made for example by
    python3 -m venv /tmp/trl && /tmp/trl/bin/pip install torch==2.13.0 trl transformers datasets

Every system does the same work: 512 rollouts (64 prompts of the prepared start × 8), four
optimizer steps. Systems take turns, round by round, so that a machine whose speed drifts treats
them alike; medians over all iterations but each run's first are quoted.
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
TP2 = ["parallel.tp_size=2", "parallel.rollout_tp_size=2"]
# Without tensor parallelism a smaller micro-batch costs no collectives, and fits the caches.
DP2 = ["parallel.tp_size=1", "parallel.rollout_tp_size=1", "train.micro_batch_size=32"]
# tp2: trainer TP = 2, one engine with TP = 2. dp2: trainer DP = 2, an engine of its own a rank.
SYSTEMS: dict[str, tuple[str, list[str]]] = {
    "fp32-tp2": ("fp32", TP2),
    "bf16-tp2": ("bf16", TP2),
    "fp16-tp2": ("fp16", TP2),
    "fp32-dp2": ("fp32", DP2),
    "bf16-dp2": ("bf16", DP2),
    "fp16-dp2": ("fp16", DP2),
}
PHASES = ("rollout", "old_logprobs", "train", "sync", "other", "iteration")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--trl", type=Path, help="interpreter of an environment with trl")
    parser.add_argument("--systems", nargs="+", choices=list(SYSTEMS), help="default: all")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--iterations", type=int, default=6)
    args = parser.parse_args()

    sys.path.insert(0, str(ROOT))
    import recipes
    from megatron_precision.data.start import start_dir
    from megatron_precision.launch.local import ensure_start

    os.chdir(ROOT)
    config = recipes.build("sanity.tiny_dense")
    if ensure_start(config):
        sys.exit("the start could not be made")
    start = start_dir(config)
    samples: dict[str, list[dict[str, float]]] = {}
    for number in range(args.rounds):
        if args.trl:
            samples.setdefault("trl-fp32", []).extend(_trl(args.trl, start, args.iterations))
            _write(args.out, samples)
        for name in args.systems or SYSTEMS:
            precision, layout = SYSTEMS[name]
            samples.setdefault(name, []).extend(_ours(precision, layout, args.iterations))
            _write(args.out, samples)
            print(f"round {number + 1}: {name}", flush=True)
    for name, rows in samples.items():
        medians = _medians(rows)
        print(f"{name:28s}", "  ".join(f"{key} {value:,.3f}" for key, value in medians.items()))


def _write(out: Path, samples: dict[str, list[dict[str, float]]]) -> None:
    """Write what there is so far: a run that is cut short keeps its finished systems."""
    out.parent.mkdir(parents=True, exist_ok=True)
    report = {
        "command": shlex.join(["benchmarks/bench_speed.py", *sys.argv[1:]]),
        "cores": len(os.sched_getaffinity(0)),
        "load_average": os.getloadavg(),
        "medians": {name: _medians(rows) for name, rows in samples.items()},
        "samples": samples,
    }
    out.write_text(json.dumps(report, indent=1), encoding="utf-8")


def _ours(precision: str, layout: list[str], iterations: int) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "run")
        words = [sys.executable, "launch.py", "sanity.tiny_dense", "--precision", precision]
        sets = [f"train.iterations={iterations}", "eval.every=0", "eval.samples_per_question=1"]
        subprocess.run(
            [*words, "--set", *sets, *layout, "--out", str(out)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [json.loads(line) for line in lines]
    rows = []
    for event in [e for e in events if e["event"] == "iteration"][1:]:
        row = {f"{phase}_s": float(event[f"time/{phase}_s"]) for phase in PHASES}
        row["tokens_per_s"] = event["throughput/tokens_per_s"]
        row["rollout_tokens_per_s"] = event["throughput/rollout_tokens_per_s"]
        steps = [e for e in events if e["event"] == "step" and e["iteration"] == event["iteration"]]
        row["step_s"] = statistics.median(e["time/step_s"] for e in steps)
        rows.append(row)
    return rows


def _trl(python: Path, start: Path, iterations: int) -> list[dict[str, float]]:
    with tempfile.TemporaryDirectory() as folder:
        script = str(ROOT / "scripts" / "bench_trl.py")
        words = ["--start", str(start), "--iterations", str(iterations), "--out", folder]
        done = subprocess.run(
            [str(python), script, *words], check=True, capture_output=True, text=True
        )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return [
        {"iteration_s": seconds, "tokens_per_s": tokens / seconds}
        for seconds, tokens in zip(found["seconds"][1:], found["tokens"][1:], strict=True)
    ]


def _medians(rows: list[dict[str, float]]) -> dict[str, float]:
    return {key: statistics.median(row[key] for row in rows) for key in rows[0]}


if __name__ == "__main__":
    main()
