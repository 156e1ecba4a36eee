"""Says what a resume may change of a run's configuration, and what a change costs.

A checkpoint has the configuration that wrote it. This module imports no torch.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_precision.checkpoint import folders
from megatron_precision.checkpoint.run_folder import METRICS
from megatron_precision.config import user_files
from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.schema import RunConfig, to_dict
from megatron_precision.report.runs import flatten

# Changes nothing that is trained: how long, who watches, what is written down.
_FREE = (
    "train.iterations", "train.mismatch_every", "train.dump_every", "train.dump_jump_factor",
    "train.dump_jumps_at_most", "train.dump_weights_gib", "checkpoint.", "watchdog.", "sinks.",
    "eval.", "sync.batch_mib", "memory.recompute", "memory.optimizer_offload",
    "memory.engine_sleep", "memory.offload_trainer", "task.scorer_workers",
    "task.scorer_time_limit_s", "loss_scale.hopeless_overflows", "start.public_name",
)  # fmt: skip
# Although what surrounds it is free: another dtype makes another run.
_FIXED = ("kernels.fp32_lm_head",)
# Sums in another order, by what depends on it.
_ROUNDING = {
    "parallel.rollout_tp_size": "the engine's layout",
    "parallel.": "the trainer's layout",
    "kernels.": "the kernels",
    "train.micro_batch_size": "the micro-batches",
    "train.micro_batch_tokens": "the micro-batches",
    "train.packed_sequences": "the micro-batches",
    "rollout.max_num_seqs": "the engine's batches",
    "rollout.max_num_batched_tokens": "the engine's batches",
    "rollout.kv_cache_mib": "the engine's batches",
    "rollout.prefix_caching": "the engine's batches",
}
# The format of `trainer.json`.
VERSION = 1
# Counts of restarts that the schedulers keep, and of earlier tasks of an array that is one job
# (`launching/slurm_setup.sh`).
_RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT", "EARLIER_ARRAY_TASKS")


def was_restarted() -> bool:
    """Say whether Slurm or torchrun has started this job before."""
    return any(int(os.environ.get(name) or 0) > 0 for name in _RESTARTS)


def changes(config: RunConfig, saved: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the settings that changed: path to saved value and new value.

    A field that the saved configuration does not know, since it is older, is as it was.
    """
    now = flatten(to_dict(config))
    before = flatten(saved)
    return {p: (before[p], value) for p, value in now.items() if before.get(p, value) != value}


def state_problems(config: RunConfig, state: Mapping[str, Any], where: str) -> list[Problem]:
    """List what keeps a configuration from resuming a checkpoint.

    Args:
        state: the checkpoint's `trainer.json`.
        where: its folder.
    """
    if (version := state.get("version")) != VERSION:
        return [
            Problem(
                "a checkpoint of another format version", f"{where}/{folders.STATE}: version",
                str(version), str(VERSION),
                "resume with the version of megatron_precision that wrote it, or start a new run",
            )
        ]  # fmt: skip
    return [
        *_changed_files(config, state, where),
        *(
            Problem(
                "a resumed run cannot change this",
                path,
                f"{now}",
                f"{before}, as {where} was written with",
                "resume with the run's own value, or start a new run with another --out",
            )
            for path, (before, now) in changes(config, state["config"]).items()
            if path in _FIXED or not path.startswith((*_FREE, *_ROUNDING))
        ),
    ]


def _changed_files(config: RunConfig, state: Mapping[str, Any], where: str) -> list[Problem]:
    """List the user's files whose content is no longer what the checkpoint was trained with."""
    before = state.get("user_files", {})  # a checkpoint of an older version has none
    return [
        Problem(
            "a resumed run cannot change this file",
            path,
            f"SHA-256 {now[:12]}...",
            f"{before[path][:12]}..., as {where} was written with",
            "restore the file, or start a new run with another --out",
        )
        for path, now in user_files.hashes(config).items()
        if before.get(path, now) != now
    ]


def not_identical(
    config: RunConfig, state: Mapping[str, Any], versions: Mapping[str, str]
) -> list[str]:
    """List why the rest of the run equals an unbroken one to rounding only.

    Args:
        versions: of what computes, now.
    """
    found: dict[str, list[str]] = {}
    for path, (before, now) in changes(config, state["config"]).items():
        kind = next((kind for start, kind in _ROUNDING.items() if path.startswith(start)), None)
        if kind is not None:
            found.setdefault(kind, []).append(f"{path} {before} → {now}")
    lines = [f"{kind} ({', '.join(changed)})" for kind, changed in found.items()]
    if (was := state["versions"]) != versions:
        names = sorted({n for n in {*was, *versions} if was.get(n) != versions.get(n)})
        lines += [
            f"{name} {was.get(name, 'none')} → {versions.get(name, 'none')}" for name in names
        ]
    if state["config"]["parallel"]["world_size"] != config.parallel.world_size:
        lines.append("random generators of the ranks start anew; training draws from none of them")
    return lines


def is_complete(config: RunConfig, out: Path) -> bool:
    """Say whether the run in `out` completed all iterations of `config`."""
    path, done = out / METRICS, 0
    for folder in folders.finished(out):
        with contextlib.suppress(UserError):  # damaged: the ranks will find it so, and say it
            done = max(done, folders.read_state(folder)["iteration"])
    if done < config.train.iterations or not path.is_file():
        return False
    last = path.read_bytes().rstrip(b"\n").rpartition(b"\n")[2]
    return last.startswith(b'{"event": "end"') and b'"status": "completed"' in last


def resume_problems(config: RunConfig, out: Path) -> list[Problem]:
    """List why `config` cannot resume the run in `out`, by its newest readable checkpoint."""
    for folder in reversed(folders.finished(out)):
        try:
            state = folders.read_state(folder)
        except UserError:
            continue  # damaged: the ranks will find it so, and say it
        return state_problems(config, state, str(folder))
    return []
