"""The command line: `python -m megatron_precision COMMAND`, one file of this room each.

torch, the engines and nemo-run are imported by the commands that need them, after the user's
input has been checked: `--help` and every mistake are answered at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from megatron_precision.cli import mismatch, plan, replay, sanity, sync_bench, train
from megatron_precision.config.errors import Problem, UserError, unknown_name
from megatron_precision.launch import rank

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


def _doctor(args: argparse.Namespace) -> int:
    from megatron_precision.checks import machine

    return machine.run()


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    """Build the parser, and return it with the names of its commands."""
    parser = argparse.ArgumentParser(
        prog=PROG, description="RL post-training in FP16 and BF16: Megatron Core and vLLM."
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    train.add(commands)
    sanity.add(commands)
    plan.add(commands)
    sync_bench.add(commands)
    mismatch.add(commands)
    replay.add(commands)
    doctor = commands.add_parser("doctor", help="what is installed, and what is wrong with it")
    doctor.set_defaults(run=_doctor)
    return parser, list(commands.choices)


def entry_point() -> None:
    """Run the console script."""
    # A reader that closes the pipe early, such as `head`, is no failure of ours.
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 1
    sys.exit(code)
