"""The arguments that choose a run, shared by `launch.py` and the commands, and what they mean.

torch and the engines are not imported here: every mistake is answered at once.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from megatron_precision.checkpoint import compatible, run_folder
from megatron_precision.checks import settings
from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.overrides import config_from_file
from megatron_precision.config.schema import RunConfig
from megatron_precision.launch import rank
from megatron_precision.preflight import search


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose a configuration; `resolve` reads them."""
    parser.add_argument(
        "recipe", metavar="RECIPE", nargs="?", help="such as sanity.tiny_dense, or FILE.py"
    )
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a run's config.json, in place of RECIPE"
    )
    parser.add_argument(
        "--precision", metavar="P", help="fp16, bf16, fp32, or TRAIN/ROLLOUT such as bf16/fp16"
    )
    parser.add_argument("--algo", metavar="A", help="such as PG-Seq-IS, or FILE.py:ROW")
    parser.add_argument(
        "--gpus", type=int, metavar="N", help="the recipe's layout for so many GPUs: 8, 16 or 32"
    )
    parser.add_argument(
        "--gpu-gb", type=int, metavar="G", help="memory of each, 1e9 bytes: 80 (default) or 141"
    )
    parser.add_argument(
        "--model",
        metavar="DIR",
        help="start from this Hugging Face folder, whatever model the recipe names",
    )
    add_overrides(parser, "typed overrides, for example train.iterations=40")
    parser.add_argument(
        "--mismatch-every",
        type=int,
        metavar="N",
        help="measure the mismatch every N iterations even where the algorithm needs no pass",
    )
    parser.add_argument(
        "--dryrun",
        "--dry-run",
        action="store_true",
        help="print the resolved configuration and what would run, and stop",
    )


def add_overrides(parser: argparse.ArgumentParser, text: str) -> None:
    """Add `--set`, which may be repeated and takes several overrides."""
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="PATH=VALUE",
        nargs="+",
        action="extend",
        default=[],
        help=text,
    )


def add_folder_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that choose where a run writes."""
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder of the run")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in DIR")
    parser.add_argument(
        "--resume", action="store_true", help="go on with the run in DIR from its last checkpoint"
    )
    parser.add_argument(
        "--start-from",
        type=Path,
        metavar="DIR",
        help="train from this prepared start, not the cache's",
    )


def resolve(args: argparse.Namespace) -> RunConfig:
    """Build and check the configuration that the arguments describe, and the folders they name.

    Raises:
        UserError: lists everything that is wrong with them.
    """
    import recipes

    problems = []
    if "out" in args and "overwrite" in args:
        if args.out is not None and compatible.was_restarted() and run_folder.holds_run(args.out):
            args.resume, args.overwrite = True, False  # the run itself, started again
        problems = _folder_problems(args)
    overrides = list(args.overrides)
    if args.mismatch_every is not None:
        overrides.append(f"train.mismatch_every={args.mismatch_every}")
    try:
        config, found = recipes.examine(chosen(args), args.precision, args.algo, overrides)
    except UserError as wrong:
        wrong = recipes.with_all_problems(wrong, args.precision, args.algo, overrides)
        raise UserError([*wrong.problems, *problems]) from None
    problems = [*found, *settings.settings_problems(config), *problems]
    if getattr(args, "resume", False) and args.out is not None:
        problems += compatible.resume_problems(config, args.out)
    if not problems and recipes.sized(args.recipe) and not getattr(args, "judged", False):
        verdict = search.judge(config, gpu_gb(args))
        problems += [] if verdict.fits else [search.refusal(verdict)]
    if problems:
        raise UserError(problems)
    return config


def gpu_gb(args: argparse.Namespace) -> int:
    """Return the memory of the GPUs that the arguments name, in 1e9 bytes."""
    import recipes

    if sized := recipes.sized(args.recipe):
        return sized.size(args.gpus, args.gpu_gb).gpu_gb
    return args.gpu_gb or 80


def _recipe_or_file(args: argparse.Namespace) -> RunConfig:
    """Return the configuration before any change, by name or from a file."""
    import recipes

    if (args.recipe is None) == (args.config is None):
        raise UserError(
            Problem(
                what="no recipe" if args.recipe is None else "a recipe and a configuration file",
                where="RECIPE",
                got="neither" if args.recipe is None else f"{args.recipe} and {args.config}",
                expected="RECIPE or --config FILE; recipes are "
                + ", ".join([*recipes.RECIPES, "FILE.py"]),
                remedy=_swallowed(args),
            )
        )
    if args.config:
        return config_from_file(args.config)
    # `plan` judges a recipe of one layout by any card.
    one_layout = getattr(args, "judged", False) and recipes.sized(args.recipe) is None
    return sized_recipe(args.recipe, args.gpus, None if one_layout else args.gpu_gb)


def sized_recipe(name: str, gpus: int | None = None, gpu_gb: int | None = None) -> RunConfig:
    """Build a recipe for a job of a size; see `recipes.recipe`.

    Raises:
        UserError: as there; for a size without a layout it names the nearest one that fits.
    """
    import recipes
    from recipes.layouts import NoLayoutError

    try:
        return recipes.recipe(name, gpus, gpu_gb)
    except NoLayoutError as wrong:
        config, size, (problem,) = wrong.config, wrong.size, wrong.problems
    verdict = search.judge(config, size.gpu_gb)
    if config.parallel.world_size == size.gpus and not verdict.fits:
        raise UserError(search.refusal(verdict))
    found = search.nearest(config, size.gpu_gb, size.gpus) if size.gpus >= 1 else None
    remedy = "no layout of that size fits"
    if found:
        layout = search.describe(found.config.parallel)
        remedy = f"--set parallel.world_size={size.gpus} {layout} fits and was never run"
    raise UserError(dataclasses.replace(problem, remedy=remedy))


def chosen(args: argparse.Namespace) -> RunConfig:
    """Return the configuration before any change, with the model of `--model`."""
    from megatron_precision.checks import inputs

    config = _recipe_or_file(args)
    return config if args.model is None else inputs.with_checkpoint(config, args.model)


def _swallowed(args: argparse.Namespace) -> str:
    """Advise a user whose recipe `--set` took: it takes every word up to the next option."""
    import recipes

    found = [word for word in args.overrides if word in recipes.RECIPES]
    return f"write the recipe first: {found[0]} --set ..." if found else ""


def _folder_problems(args: argparse.Namespace) -> list[Problem]:
    """List what is wrong with the folders that the arguments name; ranks skip this."""
    # Rank 0 may have claimed the folder before another rank looks.
    if getattr(args, "claimed", False) or rank.number() != 0:
        return []
    found = []
    if args.out is not None:
        found += run_folder.claim_problems(args.out, args.overwrite, args.resume)
    elif not args.dryrun:
        found.append(
            Problem("no folder for the run", "--out", "nothing", "a new folder, such as runs/x")
        )
    if args.start_from is not None:
        from megatron_precision.data import start

        if not start.start_is_complete(args.start_from):
            found.append(no_start("--start-from", args.start_from, "leave --start-from out"))
    return found


def recipe_words(args: argparse.Namespace) -> list[str]:
    """Return the recipe arguments as a user types them."""
    words = [args.recipe] if args.recipe else ["--config", str(args.config)]
    options = (
        ("--precision", args.precision), ("--algo", args.algo), ("--model", args.model),
        ("--gpus", args.gpus), ("--gpu-gb", args.gpu_gb),
    )  # fmt: skip
    for option, value in options:
        words += [option, str(value)] if value else []
    if args.mismatch_every is not None:
        words += ["--mismatch-every", str(args.mismatch_every)]
    return words + (["--set", *args.overrides] if args.overrides else [])


def require_inputs(config: RunConfig, chosen: Path | None, prepare: str) -> None:
    """Make sure that a run finds what it starts from.

    Args:
        chosen: a prepared start, by default the cache's.
        prepare: the command that makes the start.

    Raises:
        UserError: lists what is missing or cannot be read.
    """
    from megatron_precision.checks import inputs
    from megatron_precision.data import start

    if config.start.kind == "checkpoint":
        inputs.check(config)
        return
    path = chosen or start.start_dir(config)
    if not start.start_is_complete(path):
        where = "--start-from" if chosen else "the cache of starts"
        raise UserError(no_start(where, path, f"make it with: {prepare}"))


def no_start(where: str, path: Path, remedy: str) -> Problem:
    return Problem(
        what="there is no prepared start to train from",
        where=where,
        got=str(path),
        expected="a finished supervised start with its perfectible set",
        remedy=remedy,
    )
