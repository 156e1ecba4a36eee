"""Writes and reads a checkpoint's tensors through `megatron.core.dist_checkpointing`.

A checkpoint is written into a partial folder, read back and compared with its source, hashed and
renamed. It includes each rank's random generators: Python's, NumPy's, torch's and Megatron's. Every
rank calls every function.
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, tensor_parallel
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory
from megatron.core.dist_checkpointing.strategies.async_utils import AsyncCallsQueue

from megatron_precision.actor.actor import Actor
from megatron_precision.checkpoint import manifest
from megatron_precision.checkpoint.manifest import SIDECAR, copy_sidecar, state_dtype
from megatron_precision.checkpoint.optimizer_state import OptimizerBoxes
from megatron_precision.platform import checkpoint_writers


class CheckpointError(RuntimeError):
    """A checkpoint differs from what was written into it."""


class Writing:
    """A checkpoint that is being written.

    Everything is copied when it begins, so that training may go on; `finish` waits for the writers
    of all ranks and compares what they wrote with what was copied.
    """

    def __init__(
        self, actor: Actor, partial: Path, of_rank: dict[str, Any], background: bool = False
    ) -> None:
        """
        Args:
            partial: the folder, made anew.
            of_rank: what this rank has of its own.
            background: write in a forked process; else it is written when this returns.
        """
        checkpoint_writers.use_pipes()
        self._actor, self._partial = actor, partial
        self._queue: AsyncCallsQueue | None = None
        if dist.get_rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
        dist.barrier()
        optimizer = OptimizerBoxes(actor).saved()
        state = _state(actor, optimizer, of_rank)
        self._digests = {
            (part, name): _digest(sharded.data) for part, name, sharded in _tensors(state)
        }
        self._optimizer = {n: dataclasses.replace(s, data=None) for n, s in optimizer.items()}
        request = dist_checkpointing.save(state, str(partial), async_sharded_save=True)
        if background:
            self._queue = AsyncCallsQueue()
            self._queue.schedule_async_request(request)
        else:
            request.execute_sync()

    def is_written(self) -> bool:
        """Say whether the writers of all ranks are done."""
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=False)
            return not self._queue.get_num_unfinalized_calls()
        return True

    def finish(self) -> None:
        """Wait for the writers, and read everything back.

        Raises:
            CheckpointError: naming every tensor that reads back otherwise.
        """
        if self._queue is not None:
            self._queue.maybe_finalize_async_calls(blocking=True)
        state = _state(self._actor, dict(self._optimizer), None)
        for part, name, sharded in list(_tensors(state)):
            state[part][name] = dataclasses.replace(sharded, data=_room(sharded))
        loaded = _read(state, self._partial)
        mine = [
            f"rank {dist.get_rank()}: {part}: {name}"
            for (part, name), digest in self._digests.items()
            if _digest(loaded[part][name]) != digest
        ]
        everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
        if problems := [line for lines in everyone for line in lines]:
            raise CheckpointError(
                "a checkpoint reads back otherwise than it was written:\n  " + "\n  ".join(problems)
            )


def read(actor: Actor, folder: Path, applied_steps: int, same_ranks: bool) -> dict[str, Any]:
    """Read parameters and optimizer into the trainer, whatever layout wrote them.

    Args:
        applied_steps: of the trainer that wrote it.
        same_ranks: whether it had as many ranks as this one.

    Returns:
        What this rank had of its own; {} for another number of ranks.
    """
    actor.optimizer.make_states(applied_steps)
    boxes = OptimizerBoxes(actor)
    state = _state(actor, boxes.wanted(applied_steps > 0), {} if same_ranks else None)
    loaded = _read(state, folder)
    actor.model.module.load_state_dict(loaded["model"])
    boxes.restore(loaded["optimizer"], applied_steps > 0)
    actor.optimizer.main_copies_changed()
    found: dict[str, Any] = loaded.get("ranks", {})
    return found


def seal(partial: Path, model_dir: Path, dtype: torch.dtype) -> None:
    """Add the sidecar and, last, the manifest, for which each rank hashes the files it wrote."""
    rank = dist.get_rank()
    if rank == 0:
        (partial / SIDECAR).mkdir()
        copy_sidecar(model_dir, partial / SIDECAR)
        state_dtype(partial / SIDECAR / "config.json", (dtype,))
    names = {str(path.relative_to(partial)) for path in partial.rglob("*") if path.is_file()}
    mine = {name for name in names if name.startswith(f"__{rank}_")}
    if rank == 0:
        mine |= {name for name in names if not name.startswith("__")}
    everyone: list[dict[str, str]] = [{} for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, {n: manifest.file_hash(partial / n) for n in sorted(mine)})
    if rank == 0:
        hashes = {name: digest for part in everyone for name, digest in part.items()}
        manifest.Manifest({}, {}, dict(sorted(hashes.items()))).write(partial)


def damage(folder: Path) -> list[str]:
    """List what is wrong with a checkpoint's files, by their hashes; equal on every rank."""
    found = manifest.listed(folder)
    if found is None:
        return [f"it has no {manifest.FILE}"]
    share = sorted(found.files)[dist.get_rank() :: dist.get_world_size()]
    problems = manifest.file_problems(folder, found, share)
    mine = [f"{problem.where}: {problem.what}" for problem in problems]
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, mine)
    return [line for part in everyone for line in part]


def bytes_of(folder: Path) -> int:
    """Count the bytes of a folder's files."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _state(
    actor: Actor, optimizer: dict[str, ShardedTensor], of_rank: dict[str, Any] | None
) -> dict[str, Any]:
    state = {"model": actor.model.module.sharded_state_dict(), "optimizer": optimizer}
    if of_rank is not None:
        shape, offset = (dist.get_world_size(),), (dist.get_rank(),)
        state["ranks"] = ShardedObject("ranks", of_rank, shape, offset)
    return state


def _read(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = dist_checkpointing.load(state, str(folder))
    return loaded


def _tensors(state: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yield (part, name, sharded tensor, or a factory of several) of a state."""
    for part in ("model", "optimizer"):
        for name, sharded in state[part].items():
            if isinstance(sharded, (ShardedTensor, ShardedTensorFactory)):
                yield part, name, sharded


def _room(sharded: Any) -> torch.Tensor:
    """Allocate memory for a tensor, so that reading overwrites none of the trainer's."""
    if sharded.data is not None:
        return torch.empty_like(sharded.data)
    return torch.empty(sharded.local_shape, dtype=sharded.dtype)


def _digest(values: torch.Tensor) -> bytes:
    bits = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return hashlib.sha256(memoryview(bits.numpy())).digest()


def capture() -> dict[str, Any]:
    """Return the state of all random generators, as `restore` takes it."""
    found: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "megatron": tensor_parallel.get_cuda_rng_tracker().get_states(),
    }
    if torch.cuda.is_available():
        found["cuda"] = torch.cuda.get_rng_state()
    return found


def restore(state: dict[str, Any]) -> None:
    """Restore all random generators to a captured state."""
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    tensor_parallel.get_cuda_rng_tracker().set_states(state["megatron"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
