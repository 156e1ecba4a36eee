"""Guards the folder of a run against a second writer, and names the files in it.

config.json        the resolved configuration
metrics.jsonl      one event per line
failed_grades.txt  responses that could not be graded, and why
answers/           the answers of every evaluation
dumps/             whole iterations, for `replay`
checkpoints/       what a resume continues from (`checkpoint/folders.py`)
errors/            rank<k>.txt, the error of each rank that failed
alive/             rank<k>.json, the phase of each rank (`train/watchdog.py`)
launcher/          nemo-run's files and the logs of every rank
lock               held by rank 0 for as long as it lives
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.schema import RunConfig, to_dict
from megatron_precision.observe.metrics import cut_to

CONFIG = "config.json"
METRICS = "metrics.jsonl"
FAILED_GRADES = "failed_grades.txt"
ANSWERS = "answers"
DUMPS = "dumps"
_WAYS_ON = "go on with --resume, replace it with --overwrite, or choose another --out"
ERRORS = "errors"
ALIVE = "alive"
LOCK = "lock"


def claim(out: Path, overwrite: bool = False, resume: bool = False) -> None:
    """Ensure that `out` is an empty folder for a new run, or the run that is resumed.

    Args:
        out: the run's folder; it is created where it does not exist.
        overwrite: remove an earlier run's folder.
        resume: keep it instead.

    Raises:
        UserError: for `claim_problems`, and when `out` cannot be created.
    """
    found = claim_problems(out, overwrite, resume)
    if found:
        raise UserError(found)
    try:
        if not resume and out.is_dir() and _has_files(out):
            shutil.rmtree(out)
        out.mkdir(parents=True, exist_ok=True)
    except OSError as wrong:
        raise UserError(
            Problem("cannot use the run folder", f"--out {out}", str(wrong), "a writable folder")
        ) from wrong


def hold(out: Path) -> None:
    """Lock the folder against other runs until this process ends, however it ends.

    Raises:
        UserError: when another run's rank 0 lives there.
    """
    lock = os.open(out / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        raise UserError(_in_use(out)) from None
    except OSError as wrong:  # a file system that has no locks
        print(f"{out} cannot be locked against a second run: {wrong}", file=sys.stderr)
    # A writer of checkpoints or a worker that outlives this process must not hold it.
    os.register_at_fork(after_in_child=lambda: os.close(lock))


def is_held(out: Path) -> bool:
    """Say whether a running run holds the lock."""
    try:
        lock = os.open(out / LOCK, os.O_RDWR)
    except (FileNotFoundError, NotADirectoryError):
        return False
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # a file system that has no locks: `hold` says so
        return False
    finally:
        os.close(lock)
    return False


def _has_files(out: Path) -> bool:
    """Say whether a folder has more than the lock of a run that wrote nothing."""
    return any(path.name != LOCK for path in out.iterdir())


def _in_use(out: Path) -> Problem:
    return Problem(
        "another run is writing there", f"--out {out}", "a lock that its rank 0 holds",
        "a folder that no other run uses", "wait for it, stop it, or choose another --out",
    )  # fmt: skip


def holds_run(out: Path) -> bool:
    """Say whether a run was begun in a folder."""
    return any((out / name).is_file() for name in (CONFIG, METRICS))


def claim_problems(out: Path, overwrite: bool = False, resume: bool = False) -> list[Problem]:
    """List why `claim` would refuse.

    Nothing is changed; a dry run asks too.
    """
    found = []
    if resume and overwrite:
        found.append(
            Problem(
                "a run that is both resumed and replaced", "--resume, --overwrite", "both", "one",
                "--resume goes on, --overwrite starts over",
            )
        )  # fmt: skip
    try:
        if is_held(out):
            found.append(_in_use(out))
        elif out.exists() and (not out.is_dir() or _has_files(out)):
            found += _not_a_run(out) if resume else _occupied(out, overwrite)
    except OSError as wrong:
        found.append(
            Problem("cannot use the run folder", f"--out {out}", str(wrong), "a readable folder")
        )
    return found


def go_back(out: Path, state: Mapping[str, Any] | None) -> None:
    """Remove what a run wrote after a checkpoint; the resumed run writes it again.

    Args:
        state: of the checkpoint; None where there is none, and the run begins anew.
    """
    done = -1 if state is None else state["iteration"]
    for folder in (out / ANSWERS, out / DUMPS):
        for path in folder.glob("*"):
            number = path.name.partition(".")[0]
            # Answers are numbered by iterations that are done, dumps by the one they are of.
            if number.isdigit() and int(number) > done - (folder.name == DUMPS):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    if state is None:
        for name in (METRICS, FAILED_GRADES):
            (out / name).unlink(missing_ok=True)
        return
    cut_to(out / METRICS, state["files"][METRICS], state["iteration"])
    failed = out / FAILED_GRADES
    if failed.exists():
        os.truncate(failed, state["files"][FAILED_GRADES])


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
    """Return the folder of the job that makes a start, beside the start."""
    return start.with_name(start.name + ".prepare")


def _not_a_run(out: Path) -> list[Problem]:
    if holds_run(out):
        return []
    got = f"a folder without {CONFIG} and {METRICS}" if out.is_dir() else "a file"
    return [
        Problem("nothing to resume", f"--out {out}", got, "the folder of an earlier run, or none")
    ]


def _occupied(out: Path, overwrite: bool) -> list[Problem]:
    is_run = holds_run(out)
    holds = "a file" if not out.is_dir() else "a folder that is not empty"
    if not overwrite:
        return [
            Problem(
                "the run folder exists",
                f"--out {out}",
                "an earlier run" if is_run else holds,
                "a new or empty folder",
                _WAYS_ON if is_run else "",
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
