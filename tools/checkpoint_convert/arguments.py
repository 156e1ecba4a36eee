"""What is wrong with the arguments of a command, all of it, before torch is loaded."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_precision.errors import Problem, UserError
from tools.checkpoint_convert.folders import (
    is_megatron,
    not_a_folder,
    one_format_problem,
    source_problems,
    target_problems,
)

# The arguments that are paths, as the usage names them.
_SOURCES = {"source": "FROM", "first": "A", "second": "B", "folder": "DIR"}
_PATHS = _SOURCES | {"target": "TO", "config": "--config"}
MOST_WORKERS = 256
_NUMBERS = ("workers", "tp", "pp", "ep", "etp")


def program() -> str:
    """The command as it was called: by the console script's name, or as a module."""
    script = "megatron-precision-convert"
    return script if Path(sys.argv[0]).name == script else "python -m tools.checkpoint_convert"


def refuse_arguments(args: argparse.Namespace) -> None:
    """Make `Path`s of the paths.

    Raises:
        UserError: lists every path that is empty, or is not what the command reads or writes
            there, every number below 1, and more workers than any machine has use for.
    """
    problems = []
    for name, label in _PATHS.items():
        text = getattr(args, name, None)
        if text is not None:
            setattr(args, name, Path(text) if text else None)
        if text == "":
            problems.append(
                Problem("an empty path", label, "''", "a folder", "is a shell variable not set?")
            )
    problems += _path_problems(args)
    problems += below_one({n: getattr(args, n) for n in _NUMBERS if hasattr(args, n)})
    if getattr(args, "workers", 1) > MOST_WORKERS:
        problems.append(
            Problem("too many processes", "--workers", str(args.workers), f"up to {MOST_WORKERS}",
                    "one a core is the most that helps")
        )  # fmt: skip
    if problems:
        raise UserError(problems)


def below_one(sizes: Mapping[str, int]) -> list[Problem]:
    """The problems of sizes, by option, that are below 1."""
    return [
        Problem("a number below 1", f"--{option}", str(size), "1 or more")
        for option, size in sizes.items()
        if size < 1
    ]


def _path_problems(args: argparse.Namespace) -> Iterator[Problem]:
    given = {name: path for name in _PATHS if (path := getattr(args, name, None)) is not None}
    sources = {name: path for name, path in given.items() if name in _SOURCES}
    wrong = [problem for path in sources.values() for problem in source_problems(path)]
    yield from wrong
    if "config" in given:
        yield from not_a_folder(given["config"])
    if "source" in given and not wrong:
        yield from _direction(args.command, args.source, given.get("target", Path("TO")))
    if "target" in given:
        yield from target_problems(given.get("source"), given["target"])
    if getattr(args, "logits", False) and len(sources) == 2 and not wrong:
        yield from one_format_problem(args.first, args.second)


def _direction(command: str, source: Path, target: Path) -> Iterator[Problem]:
    """The problem of a source that the other command reads."""
    formats = {"import": "a Hugging Face folder", "export": "a Megatron folder"}
    right = "export" if is_megatron(source) else "import"
    if command != right:
        yield Problem(
            f"{command} reads {formats[command]}", str(source), formats[right], formats[command],
            f"{program()} {right} {source} {target}",
        )  # fmt: skip
