"""Checks the folders and arguments of a command, before torch is loaded."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

from megatron_precision.config.errors import Problem, UserError

# In the name of the folder of a conversion that is under way, or was killed.
PARTIAL = ".partial"
# The file that a `torch_dist` folder has and no other.
METADATA = ".metadata"


def is_megatron(path: Path) -> bool:
    """Whether it is a `torch_dist` folder; what is none is a Hugging Face folder, or nothing."""
    return (path / METADATA).is_file()


def not_a_folder(path: Path) -> list[Problem]:
    """The problem of a path that is no folder to read from, if it is none."""
    if path.is_dir():
        return []
    if path.exists():
        return [
            Problem(
                "a file, where a folder is wanted", str(path), "a file", "a folder",
                f"give the folder that holds it: {path.parent}",
            )
        ]  # fmt: skip
    return [Problem("no such folder", str(path), "nothing of that name", "a folder")]


def source_problems(path: Path) -> list[Problem]:
    """What keeps a path from being opened as a checkpoint of either format."""
    if path.resolve().name.endswith(PARTIAL):
        return [
            Problem(
                "an unfinished conversion", str(path), f"a folder named *{PARTIAL}",
                "a finished one", "convert again",
            )
        ]  # fmt: skip
    if not path.is_dir() or is_megatron(path) or (path / "config.json").is_file():
        return not_a_folder(path)
    return [
        Problem(
            "not a checkpoint",
            str(path),
            f"a folder without config.json and {METADATA}",
            "a Hugging Face folder, or a Megatron torch_dist folder",
        )
    ]


def target_problems(source: Path | None, target: Path) -> list[Problem]:
    """What keeps `target` from being made, a new folder outside `source`."""
    target = target.resolve()
    if target.exists() or target.name.endswith(PARTIAL):
        got = f"a name that ends in {PARTIAL}"
        if target.exists():
            got = "a folder that exists" if target.is_dir() else "a file that exists"
        return [
            Problem("not a new folder", str(target), got, "a new folder", "choose another name")
        ]
    if source is not None and target.is_relative_to(source.resolve()):
        return [
            Problem(
                "the output is inside the input", str(target), f"a folder in {source}",
                "a new folder outside it",
            )
        ]  # fmt: skip
    above = next(path for path in target.parents if path.exists())
    if not above.is_dir():
        return [Problem("the output is below a file", str(target), f"{above}, a file", "a folder")]
    return []


def one_format_problem(first: Path, second: Path) -> list[Problem]:
    """The problem of two folders of one format, for what compares the two."""
    if is_megatron(first) != is_megatron(second):
        return []
    return [
        Problem(
            "--logits compares the two formats", f"{first}, {second}", "one format twice",
            "a Hugging Face folder and a Megatron folder",
        )
    ]  # fmt: skip


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
