"""The folder of a run: who may write into it, and the files that every run keeps there.

config.json      the resolved configuration
metrics.jsonl    one event a line
dumps/           iterations written down whole, for `replay`
errors/          rank<k>.txt, what ended a rank that failed
launcher/        nemo-run's files and the logs of every rank
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from megatron_precision.config import RunConfig, to_dict
from megatron_precision.errors import Problem, UserError

CONFIG = "config.json"
METRICS = "metrics.jsonl"
ERRORS = "errors"


def claim(out: Path, overwrite: bool = False, resume: bool = False) -> None:
    """Make sure that `out` is an empty folder for a new run.

    Args:
        out: the run's folder; it is created where it does not exist.
        overwrite: remove an earlier run's folder.
        resume: ask to continue an earlier run, which this version cannot.

    Raises:
        UserError: for `claim_problems`, and when `out` cannot be created.
    """
    found = claim_problems(out, overwrite, resume)
    if found:
        raise UserError(found)
    try:
        if out.is_dir() and any(out.iterdir()):
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
    except OSError as wrong:
        raise UserError(
            Problem("cannot use the run folder", f"--out {out}", str(wrong), "a writable folder")
        ) from wrong


def claim_problems(out: Path, overwrite: bool = False, resume: bool = False) -> list[Problem]:
    """Why `claim` would refuse: what `out` holds without `overwrite`, or what is not a run with it.

    Nothing is changed; a dry run asks too.
    """
    found = []
    if resume:
        found.append(
            Problem(
                "resuming a run comes with a later version",
                "--resume",
                str(out),
                "a new run",
                "choose another --out, or start over with --overwrite",
            )
        )
    try:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            found += _occupied(out, overwrite)
    except OSError as wrong:
        found.append(
            Problem("cannot use the run folder", f"--out {out}", str(wrong), "a readable folder")
        )
    return found


def set_aside(out: Path) -> Path | None:
    """Move an earlier result out of the way, replacing the one moved before.

    Returns:
        Where it is now, or None when there was none.
    """
    if not out.exists():
        return None
    previous = out.with_name(out.name + ".previous")
    if previous.exists():
        shutil.rmtree(previous)
    return out.rename(previous)


def write_config(config: RunConfig, out: Path) -> Path:
    """Write `config.json`, from which a job and a later reader rebuild the configuration."""
    path = out / CONFIG
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n", encoding="utf-8")
    return path


def prepare_folder(start: Path) -> Path:
    """Where the job that makes a start keeps its own files, beside the start."""
    return start.with_name(start.name + ".prepare")


def _occupied(out: Path, overwrite: bool) -> list[Problem]:
    is_run = any((out / name).exists() for name in (CONFIG, METRICS))
    holds = "a file" if not out.is_dir() else "a folder that is not empty"
    if not overwrite:
        return [
            Problem(
                "the run folder exists",
                f"--out {out}",
                "an earlier run" if is_run else holds,
                "a new or empty folder",
                "choose another --out, or replace the run with --overwrite" if is_run else "",
            )
        ]
    if is_run:
        return []
    return [
        Problem(
            "--overwrite removes runs only",
            f"--out {out}",
            f"a folder without {CONFIG} and {METRICS}" if out.is_dir() else holds,
            "the folder of an earlier run",
            "choose another --out",
        )
    ]
