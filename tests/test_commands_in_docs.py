"""Every command in the README and the docs is accepted by the real parser.

Commands stand in `sh` blocks, and inline where they begin with `python`, `make` or
`checkpoint-convert`. Each is parsed, not run. A word in capitals, such as DIR or HF_DIR, stands for
a value of the reader's; it is replaced by 1 where an option wants a number.
"""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import recipes
from megatron_precision.cli import launch
from megatron_precision.config import overrides, user_files

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "recipes/*/*.md", "examples/*.md")
    for path in ROOT.glob(pattern)
    if path.name != "CHANGELOG.md"
)
# Commands of others: nothing of ours parses them.
OTHERS = {"pip", "sh", ".", "cd", "git", "done", "do"}
BLOCK = re.compile(r"```sh\n(.*?)```", re.DOTALL)
INLINE = re.compile(r"`((?:python|make|checkpoint-convert) [^`]+)`")
PLACEHOLDER = re.compile(r"[A-Z][A-Z_]*(\.\w+)?")
TARGETS = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE))


class Parsed(Exception):
    """Ends a program as soon as its command line is parsed."""

    def __init__(self, args: argparse.Namespace) -> None:
        super().__init__()
        self.found = args


def commands(text: str) -> Iterator[list[str]]:
    """Split a page's commands into words, without comments, assignments and `for` loops."""
    found = [
        line for block in BLOCK.findall(text) for line in block.replace("\\\n", " ").split("\n")
    ]
    found += [" ".join(code.split()) for code in INLINE.findall(text)]
    for line in found:
        words = shlex.split(line, comments=True)
        parts: list[list[str]] = [[]]
        for word in words:
            if word in ("&&", ";") or word.endswith(";"):
                parts[-1] += [word[:-1]] if len(word) > 1 and word.endswith(";") else []
                parts.append([])
            else:
                parts[-1].append(word)
        for part in parts:
            while part and (re.fullmatch(r"[A-Z_]+=.*", part[0]) or part[0] == "do"):
                part = part[1:]
            if part and part[0] != "for":
                yield part


def parse(words: list[str]) -> argparse.Namespace | None:
    """Parse one command by the program that it names; None for a target of make.

    Raises:
        AssertionError: it is not accepted.
    """
    program, *rest = words
    if program == "make":
        unknown = [word for word in rest if "=" not in word and word[0] != "["]
        assert set(unknown) <= TARGETS, f"no target {unknown}"
        return None
    if program == "checkpoint-convert":
        return _of("tools.checkpoint_convert.cli", rest)
    if program == "torchrun":
        rest = rest[rest.index("-m") :]
        program = "python"
    assert Path(program).name == "python", f"an unknown program: {words}"
    if rest[0] == "-m" and rest[1] == "megatron_precision":
        return _of("megatron_precision.cli.main", rest[2:])
    if rest[0] == "-m":
        return _of(f"{rest[1]}.__main__", rest[2:])
    if rest[0] == "launch.py":
        args, problems = launch.parse([_value(word) for word in rest[1:]])
        assert not problems, [problem.what for problem in problems]
        return args
    return _of(rest[0], rest[1:])


def _value(word: str) -> str:
    return "1" if word in ("N", "GPUS", "SECONDS") else word


def _of(module: str, words: list[str]) -> argparse.Namespace:
    words = [_value(word) for word in words]
    real = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, args: Any = None, space: Any = None) -> Any:
        raise Parsed(real(self, args, space))

    def error(self: argparse.ArgumentParser, message: str) -> Any:
        raise AssertionError(f"{module} {shlex.join(words)}: {message}")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(argparse.ArgumentParser, "error", error)
        patch.setattr(sys, "argv", [module, *words])
        try:
            if module.endswith(".py"):
                assert (ROOT / module).is_file(), f"there is no {module}"
                runpy.run_path(str(ROOT / module), run_name="__main__")
            else:
                importlib.import_module(module).main(words)
        except Parsed as parsed:
            return parsed.found
    raise AssertionError(f"{module} parsed nothing")


def check_run(args: argparse.Namespace) -> None:
    """A recipe exists, and every override is a setting with a value of its type."""
    recipe = getattr(args, "recipe", None)
    if recipe is not None:
        known = recipe in recipes.RECIPES or PLACEHOLDER.fullmatch(recipe)
        assert known or (user_files.is_reference(recipe) and (ROOT / recipe).is_file()), recipe
    for override in getattr(args, "overrides", None) or ():
        path, equals, text = override.partition("=")
        assert equals, override
        assert path in overrides.paths(), override
        if not PLACEHOLDER.search(text):
            overrides.parse(text, overrides.paths()[path])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_of_a_page_is_accepted(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    for words in commands(page.read_text(encoding="utf-8")):
        if words[0] in OTHERS or Path(words[0]).name == "pip":
            continue
        args = parse(words)
        if args is not None:
            check_run(args)


def test_the_pages_have_commands_and_a_wrong_one_is_noticed() -> None:
    readme = list(commands((ROOT / "README.md").read_text(encoding="utf-8")))
    assert len(readme) > 10
    for line in (
        "python -m megatron_precision trian sanity.tiny_dense",
        "python -m megatron_precision plan moe.grpo_seq_mis --nodess 4",
        "python launch.py sanity.tiny_dense --otu runs/x",
        "python benchmarks/bench_nothing.py --out x",
        "python benchmarks/bench_plan.py --ou x --no",
        "make sanitty",
        "checkpoint-convert import A",
    ):
        with pytest.raises((AssertionError, SystemExit)):
            parse(shlex.split(line))
    for override in ("trian.iterations=1", "train.iterations=many"):
        args = parse(["python", "launch.py", "sanity.tiny_dense", "--set", override])
        assert args is not None
        with pytest.raises((AssertionError, ValueError)):
            check_run(args)
