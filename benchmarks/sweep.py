"""Every algorithm on the tiny models, BF16 against FP16: raw figures, and docs/results.md's table.

.venv/bin/python benchmarks/sweep.py

A run that is in the raw file already, made with the same settings, is not made again: stop it and
start it as you like. All runs of a model start from one warm start and the same perfectible set;
a seed changes sampling and the order of questions.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import recipes  # noqa: E402
from megatron_precision.checks import settings  # noqa: E402
from megatron_precision.config.schema import RunConfig, fingerprint, to_dict  # noqa: E402
from megatron_precision.data.start import start_dir  # noqa: E402
from megatron_precision.launch.jobs import (  # noqa: E402
    environment,
    python_path,
    torchrun_arguments,
)
from megatron_precision.launch.local import ensure_start  # noqa: E402
from megatron_precision.rl.algorithms import ALGORITHMS  # noqa: E402

CORE = ("PPO", "PPO-Token-TIS", "PPO-Seq-MIS", "PG-Seq-IS")
SEEDS = (42, 43, 44)
MODELS = ("dense", "moe")
PRECISIONS = ("bf16", "fp16")
# So many that a run takes a minute or so on two cores that do nothing else.
ITERATIONS = 8
SETTINGS = (
    "train.prompts_per_iteration=32",
    "train.prompts_per_mini_batch=8",
    "eval.every=0",
    "eval.samples_per_question=8",
    "train.mismatch_every=1",
)
BEGIN, END = "<!-- sweep: begin -->", "<!-- sweep: end -->"


@dataclass(frozen=True)
class Case:
    """One run."""

    model: str
    precision: str
    algorithm: str
    seed: int

    @property
    def name(self) -> str:
        return f"{self.model}-{self.precision}-{self.algorithm}-{self.seed}"

    @property
    def settings(self) -> list[str]:
        return [f"train.iterations={ITERATIONS}", f"seed={self.seed}", *SETTINGS]

    @property
    def fingerprint(self) -> str:
        config = recipes.build(
            f"sanity.tiny_{self.model}", self.precision, self.algorithm, self.settings
        )
        plain = to_dict(RunConfig(recipe=config.recipe))
        return fingerprint(_unlike(to_dict(settings.check(config)), plain))


def _unlike(values: dict[str, Any], plain: dict[str, Any]) -> dict[str, Any]:
    """What differs from the defaults: a field that is new since a run was made changes no name."""
    return {
        name: _unlike(value, plain.get(name, {})) if isinstance(value, dict) else value
        for name, value in values.items()
        if value != plain.get(name)
    }


def cases() -> Iterator[Case]:
    """Every algorithm with the first seed, then the core ones with the others."""
    others = [name for name in ALGORITHMS if name not in CORE]
    for seed in SEEDS:
        for name in (*CORE, *(others if seed == SEEDS[0] else ())):
            for model in MODELS:
                for precision in PRECISIONS:
                    yield Case(model, precision, name, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--raw", type=Path, default=ROOT / "docs/benchmarks/raw/sweep.json")
    parser.add_argument("--table", type=Path, default=ROOT / "docs/results.md")
    parser.add_argument("--runs", type=Path, default=Path("runs/sweep"))
    parser.add_argument("--only", default="", metavar="TEXT", help="runs whose name holds TEXT")
    parser.add_argument("--draw", action="store_true", help="write the table, and make no run")
    args = parser.parse_args()
    rows: dict[str, Any] = json.loads(args.raw.read_text()) if args.raw.is_file() else {}
    for case in cases():
        if args.draw or args.only not in case.name:
            continue
        if rows.get(case.name, {}).get("fingerprint") != case.fingerprint:
            rows[case.name] = make(case, args.runs)
            write(args.raw, json.dumps(dict(sorted(rows.items())), indent=1) + "\n")
            draw(args.table, rows)
    draw(args.table, rows)


def make(case: Case, runs: Path) -> dict[str, Any]:
    """Run one case and sum it up."""
    config = recipes.build(f"sanity.tiny_{case.model}")
    if ensure_start(config):
        raise SystemExit("the start could not be made")
    out, ranks = runs / case.name, config.parallel.world_size
    # By hand: what launch.py adds is a console and ten seconds.
    words = ["train", config.recipe, "--precision", case.precision, "--algo", case.algorithm]
    words += ["--out", str(out), "--overwrite", "--start-from", str(start_dir(config))]
    words += ["--set", *case.settings]
    print(f"\n{case.name}", flush=True)
    begin = time.monotonic()
    variables = os.environ | environment(ranks) | {"PYTHONPATH": python_path()}
    line = [sys.executable, "-m", "torch.distributed.run", *torchrun_arguments(ranks, words)]
    code = subprocess.run(line, check=False, env=variables).returncode
    seconds = round(time.monotonic() - begin, 1)
    summary = {"exit_code": code, "seconds": seconds, **summed_up(out / "metrics.jsonl")}
    return {**asdict(case), "fingerprint": case.fingerprint, **summary}


def summed_up(path: Path) -> dict[str, Any]:
    """What the table needs of one run's events."""
    events = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    of = {kind: [e for e in events if e["event"] == kind] for kind in ("eval", "step", "iteration")}
    rewards = [e["reward/accuracy"] for e in of["iteration"]]
    best = [max(rewards[: n + 1]) for n in range(len(rewards))]
    ends = [e for e in events if e["event"] == "end"]
    return {
        "status": ends[-1]["status"] if ends else "no end",
        "accuracy_before": of["eval"][0]["eval/accuracy"],
        "accuracy_after": of["eval"][-1]["eval/accuracy"],
        "rewards": rewards,
        "largest_drop": max(b - r for b, r in zip(best, rewards, strict=True)),
        "k3_kl": [e["mismatch/k3_kl"] for e in of["iteration"]],
        "seq_log_ratio_std": [e["mismatch/seq_log_ratio_std"] for e in of["iteration"]],
        "grad_norm_max": max(
            (e["loss/grad_norm"] for e in of["step"] if not e["precision/skipped"]), default=0.0
        ),
        "weight_max": max(e["loss/weight_max"] for e in of["step"]),
        "skipped": sum(e["precision/skipped"] for e in of["step"]),
    }


def draw(path: Path, rows: dict[str, Any]) -> None:
    """Write the table between its marks."""
    text = path.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    table = "\n".join(lines(rows))
    write(path, f"{before}{BEGIN}\n{table}\n{END}{after}")


def lines(rows: dict[str, Any]) -> Iterator[str]:
    """One line a model and algorithm, one pair of columns a figure."""
    heads = ["model", "algorithm", "seeds", "accuracy after (before) BF16", "FP16"]
    heads += ["k3 per token BF16", "FP16", "BF16 ÷ FP16"]
    heads += ["largest drop BF16", "FP16", "skipped FP16"]
    yield "| " + " | ".join(heads) + " |"
    yield "|" + "---|" * len(heads)
    for model in MODELS:
        for name in ALGORITHMS:
            found = {
                precision: [
                    row
                    for row in rows.values()
                    if (row["model"], row["algorithm"], row["precision"])
                    == (model, name, precision)
                ]
                for precision in PRECISIONS
            }
            if all(found.values()):
                yield line(model, name, found)


def line(model: str, name: str, found: dict[str, list[dict[str, Any]]]) -> str:
    """One line of the table: means over seeds, medians over iterations."""
    cells = [model, name, str(min(map(len, found.values())))]
    for rows in found.values():
        before = statistics.mean(row["accuracy_before"] for row in rows)
        after = [row["accuracy_after"] for row in rows]
        spread = f" ± {statistics.stdev(after):.3f}" if len(after) > 1 else ""
        cells.append(f"{statistics.mean(after):.3f}{spread} ({before:.3f})")
    k3 = [statistics.median(k for row in rows for k in row["k3_kl"]) for rows in found.values()]
    cells += [f"{k:.1e}" for k in k3] + [f"{k3[0] / k3[1]:.0f} ×"]
    cells += [f"{max(row['largest_drop'] for row in rows):.3f}" for rows in found.values()]
    cells.append(str(sum(row["skipped"] for row in found["fp16"])))
    return "| " + " | ".join(cells) + " |"


def write(path: Path, text: str) -> None:
    """Whole or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    main()
