"""What plans move and how long they take to make, for the layouts of docs/weight_sync.md.

.venv/bin/python benchmarks/bench_plan.py --out docs/benchmarks/raw/sync_plan.json
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_precision.cli.sync_bench import model_of, planner_of
from megatron_precision.sync.traffic import traffic

# (model, trainer, engine, ranks)
CASES = [
    ("qwen3-14b", "tp=8", "tp=2,dp=4", 8),
    ("qwen3-14b", "tp=4,pp=2", "tp=4", 32),
    ("qwen3-30b-a3b", "tp=4,ep=8", "tp=4", 16),
    ("qwen3-30b-a3b", "tp=4,ep=8", "tp=8,ep=8", 64),
    ("qwen3-235b-a22b", "tp=4,pp=2,ep=32", "tp=8", 1024),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    cases = []
    for name, train, rollout, ranks in CASES:
        planner = planner_of(model_of(name), train, rollout, ranks, 8, False)
        found = traffic(planner, 2, 64 * 2**20)
        sent = [rank.sent for rank in found.ranks]
        entered, least = (sum(pair[i] for pair in found.network.values()) for i in (0, 1))
        received = sum(rank.received for rank in found.ranks)
        bound = sum(rank.received_bound for rank in found.ranks)
        over = f"{entered / least:.3f}" if least else "none crosses"
        print(
            f"| {name} | {train} → {rollout} | {ranks} | {found.model_bytes / 2**30:.1f} | "
            f"{received / bound:.3f} | {over} | {max(r.plan_s for r in found.ranks):.2f} s | "
            f"{max(sent) * len(sent) / sum(sent):.3f} |",
            flush=True,
        )
        case = {"model": name, "train": train, "rollout": rollout, "ranks": ranks}
        cases.append(case | dataclasses.asdict(found))
    command = shlex.join(["benchmarks/bench_plan.py", *sys.argv[1:]])
    args.out.write_text(json.dumps({"command": command, "cases": cases}) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
