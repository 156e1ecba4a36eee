"""The commands `sanity` and `report`: train in BF16 and in FP16, and compare runs on one page."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_precision.checkpoint import run_folder
from megatron_precision.checks import settings
from megatron_precision.cli import arguments
from megatron_precision.config.errors import Problem, UserError
from megatron_precision.launch import local
from megatron_precision.launch.jobs import train_job

PRECISIONS = ("bf16", "fp16")


def add(commands: Any) -> None:
    """Add both commands to the parsers of commands."""
    sanity = commands.add_parser("sanity", help="the sanity experiment: BF16 against FP16")
    sanity.add_argument("--model", choices=("dense", "moe"), default="dense", help="default: dense")
    sanity.add_argument("--out", type=Path, metavar="DIR", help="default: runs/sanity-MODEL")
    sanity.add_argument("--algo", metavar="A", help="an algorithm, for example PG-Seq-IS")
    arguments.add_overrides(sanity, "typed overrides of both runs, for example train.iterations=10")
    sanity.set_defaults(run=_sanity)

    report = commands.add_parser("report", help="compare runs in one HTML file")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folders of runs")
    report.add_argument(
        "--out",
        type=Path,
        default=Path("report.html"),
        metavar="FILE",
        help="default: report.html; PNGs are written beside it",
    )
    report.set_defaults(run=_report)


def _sanity(args: argparse.Namespace) -> int:
    out = args.out or Path("runs") / f"sanity-{args.model}"
    return run(args.model, out, args.overrides, args.algo)


def _report(args: argparse.Namespace) -> int:
    missing = [path for path in args.runs if not (path / run_folder.METRICS).is_file()]
    if missing:
        raise UserError(
            Problem("not a run", str(path), f"no {run_folder.METRICS}", "the folder of a run")
            for path in missing
        )
    report(args.runs, args.out)
    return 0


def run(model: str, out: Path, overrides: Sequence[str] = (), algo: str | None = None) -> int:
    """Run the experiment.

    An earlier result in `out` is kept as `<out>.previous`, which replaces the one before it.

    Args:
        model: `dense` or `moe`.
        out: a folder; one run a precision and `report.html` are written into it.
        overrides: `PATH=VALUE` each, for both precisions.
        algo: an algorithm by name; the recipe's own when None.

    Returns:
        0, or the exit code of the first job that failed.

    Raises:
        UserError: for a bad override or algorithm, and while another run writes into `out`.
    """
    import recipes

    began_s = time.monotonic()
    configs = {
        precision: settings.check(recipes.build(f"sanity.tiny_{model}", precision, algo, overrides))
        for precision in PRECISIONS
    }
    with local.exclusive(out.with_name(out.name + ".lock")):
        run_folder.set_aside(out)
        code = local.ensure_start(configs[PRECISIONS[0]])
        if code:
            return code
        for precision, config in configs.items():
            folder = out / precision
            print(f"\ntraining {config.recipe} in {precision} into {folder}", flush=True)
            run_folder.claim(folder)
            run_folder.write_config(config, folder)
            code = local.run_job(train_job(config, folder))
            if code:
                return code
        report([out / precision for precision in PRECISIONS], out / "report.html")
    print(f"all of it took {local.elapsed(began_s)}")
    return 0


def report(runs: Sequence[Path], out: Path) -> None:
    """Write the report of some runs and print its path and the final table."""
    from megatron_precision.report import page as writer

    writer.write_report(list(runs), out)
    print(f"\n{writer.final_table(list(runs))}\n\nreport: {out}")
