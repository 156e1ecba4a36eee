"""Launch a recipe on this machine through nemo-run.

    python launch.py sanity.tiny_dense --precision fp16 --algo PG-Seq-IS --out runs/x

It makes the warm start first when the cache has none, then trains, and exits with 0 only when
the run succeeded.
"""

from __future__ import annotations

import argparse
import importlib.util
import inspect
import shutil
import sys

import recipes
from megatron_precision import arguments, cli, inputs, launching, run_folder
from megatron_precision.errors import Problem, UserError


def main() -> int:
    """Parse, resolve, and run; see the module's docstring for the exit code."""
    args = _parser().parse_args()
    if args.list:
        for name, recipe in recipes.RECIPES.items():
            print(f"{name:<24}{(inspect.getdoc(recipe) or '').splitlines()[0]}")
        return 0
    try:
        return _launch(args)
    except UserError as wrong:
        print(wrong, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _launch(args: argparse.Namespace) -> int:
    config = arguments.resolve(args)
    if args.dryrun:
        cli.print_plan(config, cli.plan(config, args))
        return 0
    out = args.out
    _require_nemo_run()
    if config.start.kind == "checkpoint":
        inputs.check(config)
    if args.resume and cli.nothing_left(config, out):
        return 0
    run_folder.claim(out, args.overwrite, args.resume)
    run_folder.write_config(config, out)
    if args.start_from is None and config.start.kind == "warm_start":
        code = launching.ensure_start(config)
        if code and args.resume:
            return code
        if code:
            shutil.rmtree(out)  # it holds no run, and would be in the way of the next attempt
            return code
    extra = ["--start-from", str(args.start_from)] if args.start_from else []
    extra += ["--resume"] if args.resume else []
    code = launching.run_job(launching.train_job(config, out, tuple(extra)))
    if code == 0:
        print(f"run folder: {out}")
    return code


def _require_nemo_run() -> None:
    if importlib.util.find_spec("nemo_run") is None:
        raise UserError(
            Problem(
                what="nemo-run is not installed for this Python",
                where=sys.executable,
                got="no module nemo_run",
                expected="the project's environment",
                remedy="make install, then .venv/bin/python launch.py ...",
            )
        )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Launch a recipe on this machine through nemo-run (torchrun underneath)."
    )
    parser.add_argument("--list", action="store_true", help="list the recipes and stop")
    arguments.add_recipe_arguments(parser)
    arguments.add_folder_arguments(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
