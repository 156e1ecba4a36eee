"""Loads code that a user wrote outside the package: a recipe, an algorithm or a scorer.

A reference is `FILE.py:NAME`. Whatever is wrong with it becomes a `Problem` with file and line.
The file runs once a process and a content, as a module of its own name: it may be called
`math.py`, and it imports what is installed or on PYTHONPATH, not what lies beside it.
This module imports no torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_precision.config.errors import Problem, UserError, nearest
from megatron_precision.config.schema import RunConfig

_REFERENCE = re.compile(r"(?P<file>.+\.py)(?::(?P<name>[^:/]*))?")


def is_reference(text: str) -> bool:
    """Say whether a setting names a file of the user's: it ends in `.py` or in `.py:NAME`."""
    return _REFERENCE.fullmatch(text) is not None


def split(reference: str, default: str = "") -> tuple[Path, str]:
    """Split `FILE.py:NAME` into the absolute path and the name, `default` where none is given."""
    match = _REFERENCE.fullmatch(reference)
    assert match is not None
    return Path(match["file"]).expanduser().absolute(), match["name"] or default


def absolute(text: str) -> str:
    """Make the path of a reference absolute; return any other text as it is."""
    if not is_reference(text):
        return text
    path, name = split(text)
    return f"{path}:{name}" if name else str(path)


def files(config: RunConfig) -> list[Path]:
    """List the files of the user's that the ranks of a run load, absolute."""
    names = (config.algo.name, config.task.scorer)
    return list(dict.fromkeys(split(name)[0] for name in names if is_reference(name)))


def hashes(config: RunConfig) -> dict[str, str]:
    """Hash the files of the user's that a run loads: path to SHA-256; a missing file has none."""
    there = [path for path in files(config) if path.is_file()]
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in there}


def load(reference: str, option: str, expected: str, default: str = "") -> Any:
    """Load what a reference names.

    Args:
        reference: `FILE.py:NAME`, or `FILE.py` where there is a default.
        option: the setting that holds the reference, such as `--algo`.
        expected: what the name should be, for the message, such as `a function f(x)`.
        default: the name that a file alone means.

    Raises:
        UserError: the file cannot be read or is no Python, it raises, or it lacks the name.
    """
    path, name = split(reference, default)
    module = _module(path, option, f"a Python file with {expected}")
    if name and hasattr(module, name):
        return getattr(module, name)
    own = [key for key, value in vars(module).items() if _is_of(value, module)]
    close = nearest(name, own)
    if not name:
        remedy = f"write {path.name}:{own[0]}" if own else f"write {path.name}:NAME"
    else:
        remedy = f"did you mean {' or '.join(close)}?" if close else ""
    raise UserError(
        Problem(
            f"the file has no {name!r}" if name else "a file without a name in it",
            f"{option}, {path}",
            f"it has {', '.join(own)}" if own else "nothing of its own",
            f"{name or 'NAME'}: {expected}",
            remedy,
        )
    )


def call(function: Callable[..., Any], reference: str, option: str, *arguments: Any) -> Any:
    """Call a user's function.

    Raises:
        UserError: the function raises; the problem has the line of the file where it did.
    """
    try:
        return function(*arguments)
    except (Exception, SystemExit) as wrong:
        path, _ = split(reference)
        raise UserError(
            Problem(
                f"{getattr(function, '__name__', 'the function')} raises",
                f"{option}, {path}, line {_line(wrong, path)}",
                f"{type(wrong).__name__}: {wrong}",
                "a function that returns",
                "correct the file",
            )
        ) from wrong


def place(value: Any, reference: str, option: str) -> str:
    """Say where a loaded value stands: option, file, and line where the value has one."""
    path, _ = split(reference)
    code = getattr(value, "__code__", None)
    line = f", line {code.co_firstlineno}" if code and code.co_filename == str(path) else ""
    return f"{option}, {path}{line}"


def _module(path: Path, option: str, expected: str) -> ModuleType:
    """Run a file as a module, or return the module that this process made of the same content."""
    try:
        source = path.read_bytes()
    except OSError as wrong:
        near = nearest(path.name, [other.name for other in path.parent.glob("*.py")])
        raise UserError(
            Problem(
                "there is no such file" if not path.exists() else "the file cannot be read",
                option,
                f"{path}" if not path.exists() else str(wrong),
                expected,
                f"did you mean {path.with_name(near[0])}?" if near else "correct the path",
            )
        ) from wrong
    digest = hashlib.sha256(str(path).encode() + b"\0" + source).hexdigest()
    name = f"user_file_{digest[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    try:
        code = compile(source, str(path), "exec")
    except (SyntaxError, ValueError) as wrong:
        line = f", line {wrong.lineno}" if isinstance(wrong, SyntaxError) else ""
        text = (wrong.text or "").strip() if isinstance(wrong, SyntaxError) else ""
        got = getattr(wrong, "msg", str(wrong)) + (f": {text}" if text else "")
        raise UserError(
            Problem(
                "the file is not valid Python", f"{option}, {path}{line}", got, expected,
                "correct the line",
            )
        ) from wrong  # fmt: skip
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses with postponed annotations look their module up while it runs.
    sys.modules[name] = module
    try:
        exec(code, vars(module))
    except (Exception, SystemExit) as wrong:
        del sys.modules[name]
        raise UserError(
            Problem(
                "the file raises as it is imported",
                f"{option}, {path}, line {_line(wrong, path)}",
                f"{type(wrong).__name__}: {wrong}",
                expected,
                "correct the file; it runs as `python FILE.py` does, without __main__",
            )
        ) from wrong
    return module


def _line(wrong: BaseException, path: Path) -> int:
    """Return the line of the file that an exception passed last."""
    frames = traceback.extract_tb(wrong.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    return lines[-1] or 0 if lines else 0


def _is_of(value: Any, module: ModuleType) -> bool:
    """Say whether a file made a value itself: a function, a class, or one of our settings."""
    if type(value).__module__ == "builtins":
        return getattr(value, "__module__", "") == module.__name__
    return type(value).__module__.startswith("megatron_precision.")
