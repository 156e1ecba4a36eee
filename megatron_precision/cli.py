"""The command line: `python -m megatron_precision COMMAND`, and the arguments of `launch.py`.

torch, the engines and nemo-run are imported by the commands that need them, after the user's
input has been checked: `--help` and every mistake are answered at once.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_precision import arguments, rank, run_folder
from megatron_precision.checkpoint import compatible
from megatron_precision.config import RunConfig, to_dict
from megatron_precision.errors import Problem, UserError, unknown_name
from megatron_precision.offline import command as mismatch
from megatron_precision.planning import command as planning
from megatron_precision.replay import command as replay
from megatron_precision.sync_bench import command as sync_bench

PROG = "megatron-precision"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        The exit code: 0, 1 for a failure, 2 for a mistake of the user, 130 after Ctrl-C.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parse(words)
        return int(args.run(args))
    except UserError as wrong:
        rank.show_user_error(wrong)
        return 2
    except KeyboardInterrupt:
        return 130


def _parse(words: list[str]) -> argparse.Namespace:
    parser, commands = _parser()
    shown = [name for name in commands if name != mismatch.PART]
    if not words:
        expected = f"one of {', '.join(shown)}"
        raise UserError(Problem("no command", "the command line", "nothing", expected))
    if not words[0].startswith("-") and words[0] not in commands:
        raise UserError(unknown_name("command", "COMMAND", words[0], shown))
    args = parser.parse_args(words)
    args.words = words
    return args


def plan(config: RunConfig, args: argparse.Namespace) -> list[str]:
    """The commands that make the start and train from it, as they can be typed by hand."""
    from megatron_precision.launching import torchrun_line

    ranks, words = config.parallel.world_size, arguments.recipe_words(args)
    train = ["train", *words, "--out", str(args.out or "DIR")]
    train += ["--overwrite"] if args.overwrite else []
    train += ["--resume"] if args.resume else []
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


def nothing_left(config: RunConfig, out: Path) -> bool:
    """Whether a resume finds the run complete; it is said once."""
    if not compatible.is_complete(config, out):
        return False
    if rank.number() == 0:
        more = "--set train.iterations=N goes on"
        print(f"nothing left to do: all {config.train.iterations} iterations are done; {more}")
    return True


def _train(args: argparse.Namespace) -> int:
    config = arguments.resolve(args)
    lines = plan(config, args)
    if args.dryrun:
        print_plan(config, lines)
        return 0
    out = args.out
    rank.require_world(config, lines[-1])
    if args.resume and nothing_left(config, out):
        return 0
    arguments.require_inputs(config, args.start_from, lines[0])
    if rank.number() == 0:
        if not args.claimed:
            run_folder.claim(out, args.overwrite, args.resume)
        run_folder.hold(out)
        if not args.claimed:
            run_folder.write_config(config, out)

    def work() -> None:
        from megatron_precision.platform import startup

        startup.start(config.seed)
        from megatron_precision.train import loop

        end = functools.partial(rank.end, out)
        loop.run(config, out, end, start=args.start_from, resume=args.resume)

    return rank.run(work, out)


def _prepare(args: argparse.Namespace) -> int:
    from megatron_precision.launching import torchrun_line

    config = arguments.resolve(args)
    if config.start.kind == "checkpoint":
        raise UserError(
            Problem(
                "there is no start to prepare", "prepare", "a recipe that starts from a checkpoint",
                "one with a warm start", "train it right away",
            )
        )  # fmt: skip
    line = torchrun_line(config.parallel.world_size, ["prepare", *arguments.recipe_words(args)])
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

    config = arguments.resolve(args)
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


def _doctor(args: argparse.Namespace) -> int:
    from megatron_precision import doctor

    return doctor.run()


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser, and the names of its commands."""
    parser = argparse.ArgumentParser(
        prog=PROG, description="RL post-training in FP16 and BF16: Megatron Core and vLLM."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train = commands.add_parser("train", help="train a recipe (run it under torchrun)")
    arguments.add_recipe_arguments(train)
    arguments.add_folder_arguments(train)
    # The launcher has claimed --out before its ranks start.
    train.add_argument("--claimed", action="store_true", help=argparse.SUPPRESS)
    train.set_defaults(run=_train)

    prepare = commands.add_parser(
        "prepare", help="make the supervised start and the perfectible set (under torchrun)"
    )
    arguments.add_recipe_arguments(prepare)
    prepare.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    prepare.set_defaults(run=_prepare)

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

    planning.add(commands)
    sync_bench.add(commands)
    mismatch.add(commands)
    replay.add(commands)
    perfectible = commands.add_parser(
        "perfectible", help="make a set of the questions that a checkpoint answers sometimes"
    )
    arguments.add_recipe_arguments(perfectible)
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
    return parser, list(commands.choices)


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
