"""The command line: `python -m megatron_precision COMMAND`, and the arguments of `launch.py`.

torch, the engines and nemo-run are imported by the commands that need them, after the user's
input has been checked: `--help` and every mistake are answered at once.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_precision import rank, run_folder, validation
from megatron_precision.config import RunConfig, to_dict
from megatron_precision.errors import Problem, UserError
from megatron_precision.overrides import config_from_file
from megatron_precision.planning import command as planning
from megatron_precision.planning import search
from megatron_precision.replay import command as replay
from megatron_precision.sync_bench import command as sync_bench

PROG = "megatron-precision"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, 1 for a failure, 2 for a mistake of the user, 130 after Ctrl-C.
    """
    args = _parser().parse_args(argv)
    args.words = list(sys.argv[1:] if argv is None else argv)
    try:
        return int(args.run(args))
    except UserError as wrong:
        rank.show_user_error(wrong)
        return 2
    except KeyboardInterrupt:
        return 130


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that choose a configuration; `resolve` reads them."""
    parser.add_argument("recipe", metavar="RECIPE", nargs="?", help="for example sanity.tiny_dense")
    parser.add_argument(
        "--config", type=Path, metavar="FILE", help="a run's config.json, in place of RECIPE"
    )
    parser.add_argument(
        "--precision", metavar="P", help="fp16, bf16, fp32, or TRAIN/ROLLOUT such as bf16/fp16"
    )
    parser.add_argument("--algo", metavar="A", help="an algorithm, for example PG-Seq-IS")
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
    _add_overrides(parser, "typed overrides, for example train.iterations=40")
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


def _add_overrides(parser: argparse.ArgumentParser, text: str) -> None:
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
    """The arguments that choose where a run writes."""
    parser.add_argument("--out", type=Path, metavar="DIR", help="the folder of the run")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in DIR")
    parser.add_argument("--resume", action="store_true", help=argparse.SUPPRESS)  # refused so far
    parser.add_argument(
        "--start-from",
        type=Path,
        metavar="DIR",
        help="train from this prepared start, not the cache's",
    )


def resolve(args: argparse.Namespace) -> RunConfig:
    """The configuration that the arguments describe, checked, with the folders they name.

    Raises:
        UserError: lists everything that is wrong with them.
    """
    import recipes

    problems = _folder_problems(args) if "out" in args and "overwrite" in args else []
    overrides = list(args.overrides)
    if args.mismatch_every is not None:
        overrides.append(f"train.mismatch_every={args.mismatch_every}")
    try:
        config, found = recipes.examine(_chosen_model(args), args.precision, args.algo, overrides)
    except UserError as wrong:
        wrong = recipes.with_all_problems(wrong, args.precision, args.algo, overrides)
        raise UserError([*wrong.problems, *problems]) from None
    problems = [*found, *validation.problems(config), *problems]
    if not problems and args.recipe in recipes.SIZED and not getattr(args, "judged", False):
        verdict = search.judge(config, gpu_gb(args))
        problems += [] if verdict.fits else [search.refusal(verdict)]
    if problems:
        raise UserError(problems)
    return config


def gpu_gb(args: argparse.Namespace) -> int:
    """Memory of the GPUs that the arguments name, 1e9 bytes."""
    import recipes

    if args.recipe in recipes.SIZED:
        return recipes.SIZED[args.recipe].size(args.gpus, args.gpu_gb).gpu_gb
    return args.gpu_gb or 80


def _chosen(args: argparse.Namespace) -> RunConfig:
    """The configuration before it is changed, by name or from a file."""
    import recipes

    if (args.recipe is None) == (args.config is None):
        raise UserError(
            Problem(
                what="no recipe" if args.recipe is None else "a recipe and a configuration file",
                where="RECIPE",
                got="neither" if args.recipe is None else f"{args.recipe} and {args.config}",
                expected="RECIPE or --config FILE; recipes are " + ", ".join(recipes.RECIPES),
                remedy=_swallowed(args),
            )
        )
    if args.config:
        return config_from_file(args.config)
    # `plan` judges a recipe of one layout by any card.
    one_layout = getattr(args, "judged", False) and args.recipe not in recipes.SIZED
    return recipes.recipe(args.recipe, args.gpus, None if one_layout else args.gpu_gb)


def _chosen_model(args: argparse.Namespace) -> RunConfig:
    """The configuration before it is changed, with the model of `--model`."""
    from megatron_precision import inputs

    config = _chosen(args)
    return config if args.model is None else inputs.with_checkpoint(config, args.model)


def _swallowed(args: argparse.Namespace) -> str:
    """`--set` takes every word up to the next option, a recipe after it included."""
    import recipes

    found = [word for word in args.overrides if word in recipes.RECIPES]
    return f"write the recipe first: {found[0]} --set ..." if found else ""


def _folder_problems(args: argparse.Namespace) -> list[Problem]:
    """What is wrong with the folders that the arguments name; the launcher's ranks don't ask."""
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
        from megatron_precision.train import start

        if not start.start_is_complete(args.start_from):
            found.append(_no_start("--start-from", args.start_from, "leave --start-from out"))
    return found


def plan(config: RunConfig, args: argparse.Namespace) -> list[str]:
    """The commands that make the start and train from it, as they can be typed by hand."""
    from megatron_precision.launching import torchrun_line

    ranks, words = config.parallel.world_size, _recipe_words(args)
    train = ["train", *words, "--out", str(args.out or "DIR")]
    train += ["--overwrite"] if args.overwrite else []
    if args.start_from is not None:
        return [torchrun_line(ranks, [*train, "--start-from", str(args.start_from)])]
    if config.start.kind == "checkpoint":
        return [torchrun_line(ranks, train)]
    return [
        torchrun_line(ranks, ["prepare", *words]) + "   # unless the cache has the start",
        torchrun_line(ranks, train),
    ]


def print_plan(config: RunConfig, lines: Sequence[str]) -> None:
    """What a dry run says: the resolved configuration and the commands."""
    print(json.dumps(to_dict(config), indent=2))
    print("\nwould run:")
    for line in lines:
        print(f"  {line}")


def _recipe_words(args: argparse.Namespace) -> list[str]:
    """The recipe arguments again, as a user types them."""
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


def _train(args: argparse.Namespace) -> int:
    config = resolve(args)
    lines = plan(config, args)
    if args.dryrun:
        print_plan(config, lines)
        return 0
    out = args.out
    rank.require_world(config, lines[-1])
    require_inputs(config, args.start_from, lines[0])
    if rank.number() == 0 and not args.claimed:
        run_folder.claim(out, args.overwrite, args.resume)
        run_folder.write_config(config, out)

    def work() -> None:
        from megatron_precision.platform import startup

        startup.start(config.seed)
        from megatron_precision.train import loop

        loop.run(config, out, start=args.start_from)

    return rank.run(work, out)


def require_inputs(config: RunConfig, chosen: Path | None, prepare: str) -> None:
    """Make sure that a run finds what it starts from.

    Args:
        chosen: a prepared start, by default the cache's.
        prepare: the command that makes the start.

    Raises:
        UserError: lists what is missing or cannot be read.
    """
    from megatron_precision import inputs
    from megatron_precision.train import start

    if config.start.kind == "checkpoint":
        inputs.check(config)
        return
    path = chosen or start.start_dir(config)
    if not start.start_is_complete(path):
        where = "--start-from" if chosen else "the cache of starts"
        raise UserError(_no_start(where, path, f"make it with: {prepare}"))


def _no_start(where: str, path: Path, remedy: str) -> Problem:
    return Problem(
        what="there is no prepared start to train from",
        where=where,
        got=str(path),
        expected="a finished supervised start with its perfectible set",
        remedy=remedy,
    )


def _prepare(args: argparse.Namespace) -> int:
    from megatron_precision.launching import torchrun_line

    config = resolve(args)
    if config.start.kind == "checkpoint":
        raise UserError(
            Problem(
                "there is no start to prepare", "prepare", "a recipe that starts from a checkpoint",
                "one with a warm start", "train it right away",
            )
        )  # fmt: skip
    line = torchrun_line(config.parallel.world_size, ["prepare", *_recipe_words(args)])
    if args.dryrun:
        print_plan(config, [line])
        return 0
    rank.require_world(config, line)
    from megatron_precision.train import start

    def work() -> None:
        from megatron_precision.platform import startup

        startup.start(config.seed)
        from megatron_precision.train import prepare

        prepare.run(config)

    return rank.run(work, args.out or run_folder.prepare_folder(start.start_dir(config)))


def _sanity(args: argparse.Namespace) -> int:
    from megatron_precision import sanity

    out = args.out or Path("runs") / f"sanity-{args.model}"
    return sanity.run(args.model, out, args.overrides, args.algo)


def _report(args: argparse.Namespace) -> int:
    missing = [path for path in args.runs if not (path / run_folder.METRICS).is_file()]
    if missing:
        raise UserError(
            Problem("not a run", str(path), f"no {run_folder.METRICS}", "the folder of a run")
            for path in missing
        )
    from megatron_precision import sanity

    sanity.report(args.runs, args.out)
    return 0


def _perfectible(args: argparse.Namespace) -> int:
    from megatron_precision import launching, perfectible

    config = resolve(args)
    ranks = config.parallel.world_size
    words = [word for word in args.words if word not in ("--dryrun", "--dry-run")]
    line = launching.torchrun_line(ranks, words)
    if args.dryrun:
        print_plan(config, [line])
        return 0
    perfectible.require(config, args.set_file)
    if ranks > 1 and "WORLD_SIZE" not in os.environ:
        rank.become_launcher(ranks, args.words)
    rank.require_world(config, line)

    def work() -> None:
        from megatron_precision.platform import startup

        startup.start(config.seed)
        perfectible.run(config, args.set_file)

    return rank.run(work, args.set_file.with_name(args.set_file.name + ".job"))


def _plan(args: argparse.Namespace) -> int:
    import recipes
    from recipes.layouts import SIZES

    if not args.all_sizes:
        return planning.run(resolve(args), gpu_gb(args), args.json)
    sized = recipes.SIZED.get(args.recipe or "")
    if sized is None:
        raise UserError(
            Problem(
                "no table of sizes", "--all-sizes", str(args.recipe),
                "one of " + ", ".join(recipes.SIZED),
            )
        )  # fmt: skip
    rows: list[tuple[str, search.Verdict | None, str]] = []
    for size in dict.fromkeys((*SIZES, *sized.layouts)):
        args.gpus, args.gpu_gb = size.gpus, size.gpu_gb
        try:
            verdict = search.judge(resolve(args), size.gpu_gb)
            why = "" if verdict.fits else str(search.refusal(verdict))
            rows.append((str(size), verdict, why))
        except UserError as wrong:
            rows.append((str(size), None, str(wrong)))
    planning.print_sizes(rows, args.json)
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from megatron_precision import doctor

    return doctor.run()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROG, description="RL post-training in FP16 and BF16: Megatron Core and vLLM."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = commands.add_parser("train", help="train a recipe (run it under torchrun)")
    add_recipe_arguments(train)
    add_folder_arguments(train)
    # The launcher has claimed --out before its ranks start.
    train.add_argument("--claimed", action="store_true", help=argparse.SUPPRESS)
    train.set_defaults(run=_train)

    prepare = commands.add_parser(
        "prepare", help="make the supervised start and the perfectible set (under torchrun)"
    )
    add_recipe_arguments(prepare)
    prepare.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    prepare.set_defaults(run=_prepare)

    sanity = commands.add_parser("sanity", help="the sanity experiment: BF16 against FP16")
    sanity.add_argument("--model", choices=("dense", "moe"), default="dense", help="default: dense")
    sanity.add_argument("--out", type=Path, metavar="DIR", help="default: runs/sanity-MODEL")
    sanity.add_argument("--algo", metavar="A", help="an algorithm, for example PG-Seq-IS")
    _add_overrides(sanity, "typed overrides of both runs, for example train.iterations=10")
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

    plan = commands.add_parser("plan", help="memory of a recipe's ranks, and whether it fits")
    add_recipe_arguments(plan)
    planning.add_arguments(plan)
    plan.set_defaults(run=_plan, judged=True)
    sync_bench.add(commands)
    replay.add(commands)
    perfectible = commands.add_parser(
        "perfectible", help="make a set of the questions that a checkpoint answers sometimes"
    )
    add_recipe_arguments(perfectible)
    perfectible.add_argument(
        "--out",
        dest="set_file",
        type=Path,
        metavar="FILE",
        help="a new .jsonl file; the same command goes on where one was stopped",
    )
    perfectible.set_defaults(run=_perfectible)
    doctor = commands.add_parser("doctor", help="what is installed, and what is wrong with it")
    doctor.set_defaults(run=_doctor)
    return parser


def entry_point() -> None:
    """The console script."""
    # A reader that closes the pipe early, such as `head`, is no failure of ours.
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
