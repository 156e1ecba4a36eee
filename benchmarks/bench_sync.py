"""A sync executed on this machine's processes: by plan, with its proof, against a full gather.

.venv/bin/python benchmarks/bench_sync.py --out docs/benchmarks/raw/sync_execute.json
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

# (model, layers, trainer, engine, apart)
CASES = [
    ("qwen3-14b", 2, "tp=2", "tp=2", False),
    ("qwen3-14b", 2, "tp=2", "tp=1,dp=2", False),
    ("qwen3-14b", 4, "tp=2", "tp=1,dp=2", False),
    ("qwen3-14b", 2, "pp=2", "tp=2", False),
    ("qwen3-30b-a3b", 2, "ep=2", "tp=2", False),
    ("qwen3-14b", 2, "tp=4", "tp=2,dp=2", False),
    ("qwen3-14b", 2, "tp=2,dp=2", "tp=4", False),
    ("qwen3-14b", 4, "tp=2,dp=2", "tp=4", False),
    ("qwen3-14b", 2, "tp=2,pp=2", "tp=4", False),
    ("qwen3-14b", 2, "tp=2", "tp=2", True),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    found = []
    for case in CASES:
        model, layers, train, rollout, apart = case
        line = [sys.executable, "-m", "benchmarks.sync", "--json"]
        line += ["--model", model, "--layers", str(layers), "--vocab-rows", "4096"]
        line += ["--train", train, "--rollout", rollout, "--rounds", str(args.rounds)]
        line += ["--apart"] if apart else []
        shown = subprocess.run(line, check=True, stdout=subprocess.PIPE, text=True).stdout
        values = json.loads(shown)
        found.append({"command": shlex.join(line[1:]), **values})
        print(_row(case, values), flush=True)
        command = shlex.join(["benchmarks/bench_sync.py", *sys.argv[1:]])
        args.out.write_text(json.dumps({"command": command, "cases": found}) + "\n", "utf-8")


def _row(case: tuple[Any, ...], values: dict[str, Any]) -> str:
    """A line of the table in docs/benchmarks."""
    model, layers, train, rollout, apart = case
    seconds, mib = values["seconds"], 2**20

    def ratio(way: str, other: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[way], seconds[other], strict=True))

    received, extra = values["received"], values["extra_bytes"]
    cells = [
        f"{model}, {layers} layers",
        f"{train} → {rollout}{', apart' if apart else ''}",
        str(values["ranks"]),
        f"{received['by plan'] / mib:.0f} / {received['full gather'] / mib:.0f}",
        f"{statistics.median(seconds['by plan']):.2f} s",
        f"{ratio('full gather', 'by plan'):.1f} ×",
        f"{ratio('by plan', 'memory copy'):.1f}",
        f"{ratio('proof', 'by plan'):.2f} / {ratio('sums compared', 'by plan'):.4f}",
        f"{extra['by plan'] / mib:.0f} / {extra['full gather'] / mib:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
