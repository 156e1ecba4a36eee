"""Reads a site's defaults: one TOML file with the options that all launches on a cluster share.

    partition = "batch"
    container_image = "registry.example/megatron-precision:1.0"
    mounts = ["/lustre/models:/models"]
    env = ["WANDB_API_KEY"]           # names; the values stay in the environment

    [slurm]
    sbatch = { qos = "normal" }       # further #SBATCH lines

Without the file there are no defaults. Secrets do not belong in it.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_precision.config.errors import Problem, unknown_name

_TEXT, _COUNT, _FLAG, _TEXTS, _TABLE = (
    "a string", "a whole number", "true or false", "a list of strings",
    "a table of strings, numbers and true or false",
)  # fmt: skip
# Defaults of the options of the same names.
DEFAULTS = {
    "account": _TEXT,
    "partition": _TEXT,
    "time": _TEXT,
    "container_image": _TEXT,
    "gpus_per_node": _COUNT,
    "retries": _COUNT,
    "restarts": _COUNT,
    "array": _COUNT,
    "mounts": _TEXTS,
    "env": _TEXTS,
    "srun_args": _TEXTS,
}
# Settings of one executor that have no option.
SECTIONS = {
    "slurm": {"sbatch": _TABLE, "request_gpus": _FLAG, "exclusive": _FLAG},
    "docker": {"runtime": _TEXT, "shm_size": _TEXT},
    "kubeflow": {
        "namespace": _TEXT, "runtime_ref": _TEXT, "workdir_pvc": _TEXT, "workdir_pvc_path": _TEXT,
        "secret": _TEXT,
    },
    "skypilot": {"infra": _TEXT, "gpus": _TEXT, "cluster_name": _TEXT, "setup": _TEXT},
}  # fmt: skip


@dataclass(frozen=True)
class Site:
    """The defaults of a site.

    Attributes:
        path: the file, for error messages.
        defaults: option → value, for the names in `DEFAULTS`.
        sections: executor → setting → value, for the names in `SECTIONS`.
    """

    path: Path
    defaults: Mapping[str, Any] = field(default_factory=dict)
    sections: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def section(self, executor: str) -> Mapping[str, Any]:
        """Return the settings of one executor."""
        return self.sections.get(executor, {})


def usual_path() -> Path:
    """Return the path of the file that is read without `--site`."""
    home = os.environ.get("XDG_CONFIG_HOME") or "~/.config"
    return Path(home).expanduser() / "megatron_precision" / "site.toml"


def read(chosen: str | None) -> tuple[Site, list[Problem]]:
    """Read a site's file.

    Args:
        chosen: the file of `--site`, which must exist; None for the usual file, which need not.

    Returns:
        The site's defaults, which are empty if the file has problems; the problems.
    """
    path = usual_path() if chosen is None else Path(chosen)
    if chosen is None and not path.is_file():
        return Site(path), []
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as wrong:
        return Site(path), [
            Problem("cannot read the site file", f"--site {path}", wrong.strerror or "", "a file")
        ]
    except ValueError as wrong:
        return Site(path), [Problem("the site file is not TOML", str(path), str(wrong), "TOML")]
    defaults = {name: value for name, value in values.items() if name not in SECTIONS}
    sections = {name: values[name] for name in SECTIONS if name in values}
    problems = list(_problems(path, "", defaults, DEFAULTS))
    for name, section in sections.items():
        if isinstance(section, dict):
            problems += _problems(path, f"{name}.", section, SECTIONS[name])
        else:
            problems.append(Problem("not a section", f"{path}: {name}", repr(section), "a table"))
    if problems:
        return Site(path), problems
    return Site(path, defaults, sections), []


def _problems(
    path: Path, prefix: str, values: Mapping[str, Any], known: Mapping[str, str]
) -> Iterator[Problem]:
    for name, value in values.items():
        where = f"{path}: {prefix}{name}"
        if name not in known:
            valid = [*known] if prefix else [*known, *SECTIONS]
            yield unknown_name("key of the site file", where, name, valid)
        elif not _fits(value, known[name]):
            yield Problem("wrong value in the site file", where, repr(value), known[name])


def _fits(value: object, kind: str) -> bool:
    if kind == _COUNT:
        return type(value) is int
    if kind == _FLAG:
        return type(value) is bool
    if kind == _TEXTS:
        return isinstance(value, list) and all(isinstance(part, str) for part in value)
    if kind == _TABLE:
        return isinstance(value, dict) and all(
            isinstance(part, str | int | bool) for part in value.values()
        )
    return isinstance(value, str)
