"""Dumps an iteration (`observe/dump.py`): every so often, and when a value jumps.

keep_weights()   before the update, while trainer and engine hold the same weights
see(...)         after the steps, when mismatch and gradient norms are known

A mismatch or a gradient norm jumps when

    value > factor × median(the last `WINDOW` values before it)

or when it is not finite. Before `MIN_HISTORY` values are known, only a value that is not finite
jumps. A finite value that jumped enters the history like any other, so a new level counts as a
jump for half a window and no longer. Above a median of zero nothing jumps.
"""

from __future__ import annotations

import math
import statistics
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from megatron_precision.actor.actor import Actor, StepResult
from megatron_precision.actor.batch import Batch
from megatron_precision.actor.parameters import gathered
from megatron_precision.checkpoint.run_folder import DUMPS
from megatron_precision.config.schema import UNKNOWN_EXPERT, RunConfig, to_dict
from megatron_precision.data.tasks import Task
from megatron_precision.layouts.architectures import hf_shapes
from megatron_precision.layouts.hf_files import write_checkpoint
from megatron_precision.layouts.regions import Region
from megatron_precision.observe import dump
from megatron_precision.observe.metrics import finite
from megatron_precision.platform import startup
from megatron_precision.precision.dtypes import torch_dtype
from megatron_precision.rl.mismatch import mismatch_stats
from megatron_precision.train.rollouts import RolloutGroups

WINDOW = 20
MIN_HISTORY = 4


class JumpWatch:
    """Compares each value of one quantity with the median of those before it."""

    def __init__(self, name: str, factor: float) -> None:
        """
        Args:
            name: the quantity's name, for the reason of a dump.
            factor: a value above this many medians jumps; > 1, or 0 for never.
        """
        self._name = name
        self._factor = factor
        self._history: deque[float] = deque(maxlen=WINDOW)

    def see(self, value: float) -> str:
        """Add the next value to the history.

        Returns:
            The reason why it jumps, or "" where it does not.
        """
        if not self._factor:
            return ""
        if not math.isfinite(value):
            return f"{self._name} is {value}"
        known = len(self._history) >= MIN_HISTORY
        median = statistics.median(self._history) if known else 0.0
        self._history.append(value)
        if not median or value <= self._factor * median:
            return ""
        return f"{self._name} {value:.3g} is above {self._factor:g} × its median {median:.3g}"

    def state(self) -> list[float]:
        """Return what `restore` needs."""
        return list(self._history)

    def restore(self, state: list[float]) -> None:
        """Continue from a state that `state()` returned."""
        self._history = deque(state, maxlen=WINDOW)


@dataclass
class Measured:
    """The measurements of an iteration that a dump stores.

    Attributes:
        old_logprobs: [S, L] FP32, the trainer's log-probs before the update; None where no
            sequence has them: no pass was asked for, and the first step's was not finite.
        old_known: [S] bool, the sequences that have them.
        grad_norms: the gradient norm of each step, and whether the step was skipped.
        metrics: the iteration's metrics so far.
        step: optimizer steps attempted so far.
    """

    old_logprobs: torch.Tensor | None = None
    old_known: torch.Tensor | None = None
    grad_norms: list[tuple[float, bool]] = field(default_factory=list)
    metrics: dict[str, object] = field(default_factory=dict)
    step: int = 0

    def compare(
        self, step: StepResult, batch: Batch, rows: torch.Tensor
    ) -> dict[str, float | list[float]]:
        """Keep the trainer's log-probs before the update, and compare the engine's with them.

        Args:
            step: the iteration's first step, which kept its log-probs.
            rows: the rows of that step.

        Returns:
            Metrics of all rows whose old log-probs are known; empty where none are.
        """
        assert step.logprobs is not None
        known = torch.ones(len(batch), dtype=torch.bool)
        if batch.old_logprobs is None:
            known.zero_()
        known[rows] = step.finite_forward
        if not known.any():
            return {}
        old = step.logprobs if batch.old_logprobs is None else batch.old_logprobs + step.logprobs
        self.old_logprobs, self.old_known = old, known
        return mismatch_stats(
            old_logprobs=old[known],
            rollout_logprobs=batch.rollout_logprobs[known],
            mask=batch.response_mask[known],
        ).metrics()


class Dumper:
    """Decides which iterations to dump, and writes them; every rank calls every method."""

    def __init__(self, config: RunConfig, out: Path, actor: Actor, task: Task) -> None:
        self._config = config
        self._folder = out / DUMPS
        self._actor = actor
        self._task = task
        factor = config.train.dump_jump_factor if config.train.dump_jumps_at_most else 0.0
        self._mismatch = JumpWatch("mismatch/k3_kl", factor)
        self._grad_norm = JumpWatch("loss/grad_norm", factor)
        self._jumps_left = config.train.dump_jumps_at_most
        self._keeps = (factor > 0 or config.train.dump_every > 0) and _fits(config)
        self._kept: list[tuple[Region, torch.Tensor]] = []

    def keep_weights(self) -> None:
        """Copy this rank's shard to host memory: a jump is seen after it is overwritten."""
        if self._keeps:
            self._kept = [
                (region, view.detach().to("cpu", copy=True))
                for region, view in self._actor.weights.views()
            ]

    def see(self, iteration: int, groups: RolloutGroups, batch: Batch, measured: Measured) -> None:
        """Dump the iteration where that is due.

        Args:
            groups: the groups of the batch, in its order.
            batch: what was trained on.
        """
        reasons = self._reasons(iteration, measured)
        if not reasons:
            return
        folder = self._folder / f"{iteration:06d}"
        arrays = _arrays(groups, batch, measured)
        first = dist.get_rank() == 0
        if first:
            dump.write_arrays(folder, arrays)
        if self._keeps:
            weights = gathered(self._kept, self._config.model)
            if first:
                write_checkpoint(folder / dump.WEIGHTS, self._config.model, weights)
        if first:
            dump.write_header(folder, self._header(iteration, reasons, arrays, measured))
            print(f"iteration {iteration} dumped to {folder}: {'; '.join(reasons)}", flush=True)

    def state(self) -> dict[str, Any]:
        """Return what `restore` needs."""
        return {
            "mismatch": self._mismatch.state(),
            "grad_norm": self._grad_norm.state(),
            "jumps_left": self._jumps_left,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from a state that `state()` returned."""
        self._mismatch.restore(state["mismatch"])
        self._grad_norm.restore(state["grad_norm"])
        self._jumps_left = state["jumps_left"]

    def _reasons(self, iteration: int, measured: Measured) -> tuple[str, ...]:
        """Return the reasons to dump this iteration; rank 0 decides."""
        every = self._config.train.dump_every
        found = [f"every {every} iterations"] if every and iteration % every == 0 else []
        jumps = []
        k3 = measured.metrics.get("mismatch/k3_kl")
        if isinstance(k3, float):
            jumps.append(self._mismatch.see(k3))
        # A skipped step is an event of the loss scale, counted elsewhere.
        norms = [norm for norm, skipped in measured.grad_norms if not skipped]
        if norms:
            bad = [norm for norm in norms if not math.isfinite(norm)]
            jumps.append(self._grad_norm.see(bad[0] if bad else max(norms)))
        if any(jumps) and self._jumps_left:
            self._jumps_left -= 1
            found += [jump for jump in jumps if jump]
        agreed: list[list[str]] = [found]
        dist.broadcast_object_list(agreed, 0)
        return tuple(agreed[0])

    def _header(
        self, iteration: int, reasons: tuple[str, ...], arrays: dump.Arrays, measured: Measured
    ) -> dump.Header:
        return dump.Header(
            iteration=iteration,
            step=measured.step,
            reasons=reasons,
            config=to_dict(self._config),
            platform=startup.describe(),
            versions=startup.versions(),
            metrics=finite(measured.metrics),
            grad_norms=tuple(finite(norm) for norm, _ in measured.grad_norms),
            weights=dump.WEIGHTS if self._keeps else "",
            texts={str(i): self._task.decode([i]) for i in np.unique(arrays.tokens).tolist()},
        )


def _fits(config: RunConfig) -> bool:
    """Say whether the whole model is small enough to be written beside a dump."""
    elements = sum(torch.Size(shape).numel() for shape in hf_shapes(config.model).values())
    itemsize = torch_dtype(config.policy.params).itemsize
    return elements * itemsize <= config.train.dump_weights_gib * 2**30


def _arrays(groups: RolloutGroups, batch: Batch, measured: Measured) -> dump.Arrays:
    def array(values: torch.Tensor, dtype: str) -> NDArray[Any]:
        found: NDArray[Any] = values.cpu().numpy().astype(dtype)
        return found

    old_logprobs, old_known = measured.old_logprobs, measured.old_known
    if old_logprobs is None or old_known is None:
        old_logprobs = torch.zeros_like(batch.rollout_logprobs)
        old_known = torch.zeros(len(batch), dtype=torch.bool)
    prompts, rollouts = groups.rewards.shape
    return dump.Arrays(
        tokens=array(batch.tokens, "int32"),
        response_mask=array(batch.response_mask, "bool"),
        lengths=array(batch.lengths, "int32"),
        rollout_logprobs=array(batch.rollout_logprobs, "float32"),
        old_logprobs=array(old_logprobs, "float32"),
        old_known=array(old_known, "bool"),
        rewards=array(groups.rewards.flatten(), "float32"),
        advantages=array(batch.advantages, "float32"),
        truncated=np.array([r.truncated for r in groups.rollouts], dtype=bool),
        weight_version=np.array([r.weight_version for r in groups.rollouts], dtype=np.int32),
        routed_experts=_experts(batch),
        group=np.repeat(np.arange(prompts, dtype=np.int32), rollouts),
    )


def _experts(batch: Batch) -> NDArray[np.int16] | None:
    """Return the routed experts, [S, L, layers, k] int16, -1 where no choice is known."""
    every = batch.select(torch.arange(len(batch)), batch.tokens.shape[1]).routed_experts
    if not isinstance(every, torch.Tensor):
        return None
    found: NDArray[np.int16] = every.numpy().astype(np.int16)
    return np.where(found == UNKNOWN_EXPERT, np.int16(-1), found)
