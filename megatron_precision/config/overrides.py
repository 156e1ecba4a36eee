"""Applies typed overrides such as `train.iterations=40` to a frozen `RunConfig`, and reads JSON.

The annotations of `schema.py` say what each value must be. All mistakes are reported at once, and
a field that no override names is never changed. This module imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from megatron_precision.config.bounds import Bounds
from megatron_precision.config.errors import Problem, UserError, nearest
from megatron_precision.config.schema import RunConfig

# The recipe is chosen by name before overrides are applied, and its name says what ran.
FIXED_PATHS = frozenset({"recipe"})

_FALSIFIES = (
    "training rollouts sample from the model's own distribution at rollout.temperature: any other "
    "setting makes vLLM renormalise its log-probs, and falsifies the mismatch"
)
# Settings of vLLM and Megatron that cannot be had here: the value that an earlier version wrote
# into config.json, and why no other one is possible.
NOT_SETTINGS: dict[str, tuple[Any, str]] = {
    "rollout.top_p": (1.0, _FALSIFIES),
    "rollout.top_k": (-1, _FALSIFIES),
    "rollout.repetition_penalty": (1.0, _FALSIFIES),
    "parallel.cp_size": (
        1,
        "context parallelism is not supported: divide long sequences by parallel.tp_size with "
        "parallel.sequence_parallel=true, and set memory.recompute=full memory.attention=fused",
    ),
}
_POWER = re.compile(r"([+-]?\d+)\s*\*\*\s*([+-]?\d+)")


@functools.cache
def field_types(section: type) -> dict[str, Any]:
    """Return the fields of a config dataclass with their types."""
    hints = typing.get_type_hints(section)
    return {entry.name: hints[entry.name] for entry in dataclasses.fields(section)}


@functools.cache
def paths(section: type = RunConfig, prefix: str = "") -> dict[str, Any]:
    """Return every path that can be overridden and its value's type, in the config's order."""
    found: dict[str, Any] = {}
    for name, kind in field_types(section).items():
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            found.update(paths(kind, f"{prefix}{name}."))
        elif prefix + name not in FIXED_PATHS:
            found[prefix + name] = kind
    return found


@functools.cache
def bounds(section: type = RunConfig, prefix: str = "") -> dict[str, Bounds]:
    """Return the bounds of every setting that has some, by its path, in the config's order."""
    found: dict[str, Bounds] = {}
    for name, kind in typing.get_type_hints(section, include_extras=True).items():
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            found.update(bounds(kind, f"{prefix}{name}."))
        for part in getattr(kind, "__metadata__", ()):
            if isinstance(part, Bounds):
                found[prefix + name] = part
    return found


def apply(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """Set the named fields.

    Args:
        config: the configuration that a recipe built.
        overrides: `PATH=VALUE` each. Floats may be written as powers (`2**16`).

    Returns:
        A new configuration; fields that no override names are equal to those of `config`.

    Raises:
        UserError: lists every unknown path, every value of the wrong type and every path that
            is set twice to different values.
    """
    changed, problems = examine(config, overrides)
    if problems:
        raise UserError(problems)
    return changed


def examine(config: RunConfig, overrides: Sequence[str]) -> tuple[RunConfig, list[Problem]]:
    """Apply the valid overrides, and return the problems of the others.

    The caller can then report what the valid ones break together with the invalid ones.
    """
    problems: list[Problem] = []
    texts: dict[str, str] = {}
    values: dict[str, Any] = {}
    for override in overrides:
        path, equals, text = override.partition("=")
        path, text = path.strip(), text.strip()
        if not equals:
            problems.append(_no_value(override))
        elif path in NOT_SETTINGS:
            problems.append(_not_a_setting(path, text))
        elif path not in paths():
            problems.append(_unknown_path(override, path))
        elif texts.get(path, text) != text:
            problems.append(_set_twice(path, texts[path], text))
        else:
            texts[path] = text
            try:
                values[path] = parse(text, paths()[path])
            except ValueError as wrong:
                problems.append(
                    Problem(f"wrong value for {path}", f"--set {override}", repr(text), str(wrong))
                )
    for path, value in values.items():
        config = _replace(config, path.split("."), value)
    return config, problems


def parse(text: str, kind: Any) -> Any:
    """Read one value of the annotated type from what a user typed.

    Raises:
        ValueError: its message says what would have been accepted.
    """
    if kind is bool:
        words = {"true": True, "false": False}
        if text.lower() not in words:
            raise ValueError("true or false")
        return words[text.lower()]
    if kind is int or kind is float:
        return _number(text, kind)
    if typing.get_origin(kind) is Literal:
        return _check(text, kind)
    if kind == tuple[str, ...]:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    return text


def config_from_dict(values: Mapping[str, Any]) -> RunConfig:
    """Rebuild a configuration from `config.to_dict`'s values, strictly.

    Raises:
        UserError: lists every unknown key, every missing key and every value of the wrong type.
    """
    problems: list[Problem] = []
    config = _build(RunConfig, values, "", problems)
    if problems:
        raise UserError(problems)
    return cast(RunConfig, config)


def config_from_file(path: Path) -> RunConfig:
    """Read a resolved configuration from the `config.json` of a run.

    Raises:
        UserError: when the file cannot be read, is not JSON, or is not a complete configuration.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as wrong:
        raise UserError(
            Problem("cannot read the configuration", str(path), str(wrong), "a readable file")
        ) from wrong
    except ValueError as wrong:
        raise UserError(
            Problem("the configuration is not JSON", str(path), str(wrong), "a JSON object")
        ) from wrong
    return config_from_dict(values)


def describe_type(kind: Any) -> str:
    """Describe a type in a user's words."""
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, typing.get_args(kind)))
    words = {
        int: "an integer of 64 bits",
        float: "a finite number",
        bool: "true or false",
        str: "a string",
        tuple[str, ...]: "a list of strings",
    }
    return words.get(kind, "an object")


def _number(text: str, kind: type) -> int | float:
    power = _POWER.fullmatch(text)
    value: int | float
    try:
        if power is not None:
            base, exponent = int(power[1]), int(power[2])
            # A negative exponent, or one too large to hold, is a float or nothing.
            value = base**exponent if 0 <= exponent <= 4096 else float(base) ** exponent
        else:
            value = int(text) if kind is int else float(text)
        return cast(int | float, _check(value, kind))
    except (ValueError, OverflowError, ZeroDivisionError) as wrong:
        example = "such as 40 or 2**4" if kind is int else "such as 1e-6 or 2**16"
        raise ValueError(f"{describe_type(kind)}, {example}") from wrong


def _check(value: Any, kind: Any) -> Any:
    """Return `value` as `kind`.

    Raises:
        ValueError: says what was expected.
    """
    if typing.get_origin(kind) is Literal:
        fits = value in typing.get_args(kind)
    elif kind is int:
        # The engines store integers in 64 bits.
        fits = type(value) is int and abs(value) < 2**63
    elif kind is float:
        # JSON and users write whole numbers without a point; bool is an int in Python.
        fits = isinstance(value, int | float) and not isinstance(value, bool)
        fits = fits and math.isfinite(value)
        value = float(value) if fits else value
    elif kind == tuple[str, ...]:
        # JSON has lists, and a configuration that was never written has tuples.
        fits = isinstance(value, list | tuple) and all(type(part) is str for part in value)
        value = tuple(value) if fits else value
    else:
        fits = type(value) is kind
    if not fits:
        close = []
        if typing.get_origin(kind) is Literal:
            close = nearest(str(value), [str(word) for word in typing.get_args(kind)])
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ValueError(describe_type(kind) + hint)
    return value


def _replace(section: Any, steps: Sequence[str], value: Any) -> Any:
    if len(steps) > 1:
        value = _replace(getattr(section, steps[0]), steps[1:], value)
    return dataclasses.replace(section, **{steps[0]: value})


def _build(section: type, values: Any, prefix: str, problems: list[Problem]) -> Any:
    where = prefix.rstrip(".") or "configuration"
    if not isinstance(values, Mapping):
        problems.append(Problem("not an object", where, repr(values), "an object of its fields"))
        return None
    kinds = field_types(section)
    for key in values:
        if (path := f"{prefix}{key}") in NOT_SETTINGS:
            if values[key] != NOT_SETTINGS[path][0]:
                problems.append(_not_a_setting(path, repr(values[key])))
        elif key not in kinds:
            close = nearest(str(key), list(kinds))
            remedy = f"did you mean {' or '.join(close)}?" if close else ""
            problems.append(
                Problem("unknown key", where, repr(key), "one of " + ", ".join(kinds), remedy)
            )
    built: dict[str, Any] = {}
    for name, kind in kinds.items():
        path = prefix + name
        if name not in values:
            problems.append(Problem("missing key", path, "nothing", describe_type(kind)))
        elif dataclasses.is_dataclass(kind) and isinstance(kind, type):
            built[name] = _build(kind, values[name], path + ".", problems)
        else:
            try:
                built[name] = _check(values[name], kind)
            except (ValueError, OverflowError) as wrong:
                problems.append(Problem("wrong value", path, repr(values[name]), str(wrong)))
    return None if problems else section(**built)


def _no_value(override: str) -> Problem:
    return Problem("an override without a value", f"--set {override}", repr(override), "PATH=VALUE")


def _not_a_setting(path: str, got: str) -> Problem:
    return Problem("this cannot be set", path, got, "nothing", NOT_SETTINGS[path][1])


def _set_twice(path: str, first: str, second: str) -> Problem:
    return Problem(
        f"{path} is set twice", f"--set {path}", f"{first!r} and {second!r}", "one value"
    )


def _of_near_section(path: str, valid: Sequence[str]) -> list[str]:
    """Return the fields of the section that looks like the path's first part, nearest first."""
    section, _, field = path.partition(".")
    close = nearest(section, sorted({name.partition(".")[0] for name in valid}), count=1)
    inside = [name for name in valid if close and name.startswith(close[0] + ".")]
    near = nearest(field, [name.partition(".")[2] for name in inside])
    return [f"{close[0]}.{name}" for name in near] or inside


def _unknown_path(override: str, path: str) -> Problem:
    valid = list(paths())
    inside = [name for name in valid if name.startswith(path + ".")]
    if path in FIXED_PATHS:
        remedy = "the recipe is the first argument of the command"
    elif inside:
        remedy = "it is a section; its fields are " + ", ".join(inside)
    else:
        # A field given without its section is the likeliest slip, a misspelt one the next.
        field = path.rpartition(".")[2]
        same_field = [name for name in valid if name.rpartition(".")[2] == field]
        close = same_field or nearest(path, valid) or _of_near_section(path, valid)
        remedy = f"did you mean {' or '.join(close)}?" if close else ""
    return Problem(
        what=f"unknown override path {path!r}",
        where=f"--set {override}",
        got=path,
        expected="a field of the configuration (--dryrun prints them all)",
        remedy=remedy,
    )
