"""The commands `train`, `prepare` and `perfectible`: what the ranks of a job run.

torch and the engines are imported after the user's input has been checked.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_precision.checkpoint import compatible, run_folder
from megatron_precision.cli import arguments
from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.schema import RunConfig, to_dict
from megatron_precision.launch import rank
from megatron_precision.launch.jobs import torchrun_line


def add(commands: Any) -> None:
    """Add the three commands to the parsers of commands."""
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
    from megatron_precision.data import start

    def work() -> None:
        from megatron_precision.platform import startup

        startup.start(config.seed)
        from megatron_precision.train import warm_start as prepare

        prepare.run(config)

    return rank.run(work, args.out or run_folder.prepare_folder(start.start_dir(config)))


def _perfectible(args: argparse.Namespace) -> int:
    from megatron_precision.train import perfectible

    config = arguments.resolve(args)
    ranks = config.parallel.world_size
    words = [word for word in args.words if word not in ("--dryrun", "--dry-run")]
    line = torchrun_line(ranks, words)
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


def plan(config: RunConfig, args: argparse.Namespace) -> list[str]:
    """Return the commands that make the start and train from it, as a user types them."""
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
    """Print a dry run: the resolved configuration and the commands."""
    print(json.dumps(to_dict(config), indent=2))
    print("\nwould run:")
    for line in lines:
        print(f"  {line}")


def nothing_left(config: RunConfig, out: Path) -> bool:
    """Say whether a resume finds the run complete, and print so once."""
    if not compatible.is_complete(config, out):
        return False
    if rank.number() == 0:
        more = "--set train.iterations=N goes on"
        print(f"nothing left to do: all {config.train.iterations} iterations are done; {more}")
    return True
