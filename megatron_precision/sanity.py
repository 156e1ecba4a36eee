"""`make sanity`: prepare the start, train in BF16 and in FP16, and report on both."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from megatron_precision import launching, run_folder, validation

PRECISIONS = ("bf16", "fp16")


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
        precision: validation.check(
            recipes.build(f"sanity.tiny_{model}", precision, algo, overrides)
        )
        for precision in PRECISIONS
    }
    with launching.exclusive(out.with_name(out.name + ".lock")):
        run_folder.set_aside(out)
        code = launching.ensure_start(configs[PRECISIONS[0]])
        if code:
            return code
        for precision, config in configs.items():
            folder = out / precision
            print(f"\ntraining {config.recipe} in {precision} into {folder}", flush=True)
            run_folder.claim(folder)
            run_folder.write_config(config, folder)
            code = launching.run_job(launching.train_job(config, folder))
            if code:
                return code
        report([out / precision for precision in PRECISIONS], out / "report.html")
    print(f"all of it took {launching.elapsed(began_s)}")
    return 0


def report(runs: Sequence[Path], out: Path) -> None:
    """Write the report of some runs and print its path and the final table."""
    from megatron_precision.observe import report as writer

    writer.write_report(list(runs), out)
    print(f"\n{writer.final_table(list(runs))}\n\nreport: {out}")
