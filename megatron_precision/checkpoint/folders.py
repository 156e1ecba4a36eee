"""Names, finishes, keeps and reads the folders of a run's checkpoints, without an engine.

    <run>/checkpoints/000012/            after twelve iterations
        trainer.json                     the run's small state (`train/checkpoints.py`), its config
        *.distcp, .metadata, ...         Megatron's `torch_dist` format
        huggingface/                     config and tokenizer, so that `export` takes the folder
        conversion_manifest.json         a hash of every file, written last
    <run>/checkpoints/000012.partial/    being written, or its writer was killed
    <run>/checkpoints/000012.damaged/    found damaged by a resume, and renamed

This module imports no torch.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from megatron_precision.checkpoint.run_folder import METRICS
from megatron_precision.config.errors import UserError
from megatron_precision.layouts.hf_config import read_object

CHECKPOINTS = "checkpoints"
STATE = "trainer.json"
PARTIAL = ".partial"
DAMAGED = ".damaged"


def folder_of(out: Path, iteration: int) -> Path:
    """Return the folder of the checkpoint after some iterations."""
    return out / CHECKPOINTS / f"{iteration:06d}"


def finished(out: Path) -> list[Path]:
    """List the run's checkpoints, oldest first, without checking that they are whole."""
    return sorted(path for path in (out / CHECKPOINTS).glob("*") if path.name.isdigit())


def way_on(out: Path) -> str:
    """Say in a line how to resume a run that ended early; "" if the folder has no run."""
    if not (out / METRICS).exists():
        return ""
    if whole := finished(out):
        return f"--resume goes on after {int(whole[-1].name)} iterations, from {whole[-1]}"
    return "there is no checkpoint yet: --resume begins again"


def read_state(folder: Path) -> dict[str, Any]:
    """Read a checkpoint's `trainer.json`.

    Raises:
        UserError: where that cannot be read.
    """
    return read_object(folder / STATE, "a checkpoint's state", "resume from another one")


def superfluous(states: dict[Path, dict[str, Any]], keep: int) -> list[Path]:
    """List the checkpoints that are neither among the last nor the best.

    The best is the one whose own evaluation had the highest accuracy, of several the latest.

    Args:
        states: of every finished checkpoint, oldest first.
        keep: how many of the last stay.
    """
    rated = [
        (state["evaluation"]["accuracy"], number)
        for number, state in enumerate(states.values())
        if state.get("evaluation") and state["evaluation"]["iteration"] == state["iteration"]
    ]
    stays = {max(rated)[1]} if rated else set()
    stays.update(range(len(states) - keep, len(states)))
    return [folder for number, folder in enumerate(states) if number not in stays]


def finish(partial: Path, keep: int) -> Path:
    """Give a complete checkpoint its name, and remove those that are no longer kept."""
    for path in partial.rglob("*"):
        to_disk(path)
    to_disk(partial)
    folder = partial.with_suffix("")
    if folder.exists():  # of the same iteration, when a run was stopped twice there
        shutil.rmtree(folder)
    partial.rename(folder)
    to_disk(folder.parent)
    shutil.rmtree(folder.with_suffix(DAMAGED), ignore_errors=True)
    states = {path: _known(path) for path in finished(folder.parent.parent)}
    for old in superfluous(states, keep):
        # Under another name first: half a folder must not look like a checkpoint.
        doomed = old.rename(old.with_suffix(PARTIAL))
        shutil.rmtree(doomed)
    return folder


def _known(folder: Path) -> dict[str, Any]:
    """Read a state; empty if it is damaged, since a run that writes a new one continues."""
    try:
        return read_state(folder)
    except UserError:
        return {}


def put_aside(folder: Path) -> None:
    """Rename a damaged checkpoint, so that no resume looks at it."""
    aside = folder.with_suffix(DAMAGED)
    shutil.rmtree(aside, ignore_errors=True)
    folder.rename(aside)


def remove_partial(out: Path) -> None:
    """Remove the partial checkpoints that killed writers left."""
    for path in (out / CHECKPOINTS).glob(f"*{PARTIAL}"):
        shutil.rmtree(path)


def to_disk(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
