"""Pushes the trainer's weights into the engine, and proves that the kernels read exactly those.

The two layouts give a plan (`sync/plan.py`), every rank carries out its part
(`rollout/weight_transfer.py`), and the checksums of every region are compared between the two
sides (`sync/verify.py`).
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from megatron_precision.actor.actor import Actor
from megatron_precision.config.schema import RunConfig
from megatron_precision.precision.dtypes import torch_dtype
from megatron_precision.rollout.vllm_engine import VllmEngine
from megatron_precision.sync.families import RolloutLayout, TrainerLayout
from megatron_precision.sync.flat_ranges import FlatRange, FlatRanges
from megatron_precision.sync.plan import PlanError, Planner, cell_elements_of


class WeightSyncError(RuntimeError):
    """The engine's kernels read other weights than the trainer's."""


@dataclass(frozen=True)
class SyncResult:
    """The cost of a push on this rank.

    Attributes:
        seconds: seconds of transfer and proof together.
        proof_seconds: seconds of the proof alone.
        bytes: bytes written into this rank's engine.
        received_bytes: the part of `bytes` that came from other ranks.
        regions: regions of this rank's engine that were compared; all are equal.
    """

    seconds: float
    proof_seconds: float
    bytes: int
    received_bytes: int
    regions: int

    def metrics(self, weight_version: int) -> dict[str, object]:
        """Return the push as an iteration's metrics."""
        return {
            "sync/s": self.seconds,
            "sync/bytes": self.bytes,
            "sync/received_bytes": self.received_bytes,
            "sync/proof_s": self.proof_seconds,
            "sync/verified": int(self.regions > 0),
            "sync/regions": self.regions,
            "sync/weight_version": weight_version,
        }


def colocated_planner(config: RunConfig) -> Planner:
    """Build the planner of a run whose ranks are trainer and engine at once."""
    parallel = config.parallel
    size = parallel.world_size
    trainer = TrainerLayout(
        size, parallel.tp_size, parallel.pp_size, parallel.ep_size, parallel.etp_size
    )
    rollout = RolloutLayout(size, parallel.rollout_tp_size)
    return Planner(
        config.model,
        trainer,
        rollout,
        int(os.environ.get("LOCAL_WORLD_SIZE", size)),
        cell_elements_of(config.sync.batch_mib * 2**20),
    )


def _all_ranges(actor: Actor) -> FlatRanges:
    """Gather which parts of the FP32 main copies each rank has."""
    everyone: list[tuple[FlatRange, ...]] = [()] * dist.get_world_size()
    dist.all_gather_object(everyone, tuple(actor.weights.main_copies().ranges))
    return FlatRanges(tuple(everyone))


class WeightSync:
    """Pushes the trainer's weights into the engine, and proves each push.

    Raises:
        PlanError: where a side has another layout than planned, or ranks plan differently.
    """

    def __init__(self, actor: Actor, engine: VllmEngine, config: RunConfig) -> None:
        self._actor, self._engine, self._config = actor, engine, config
        self._planner = colocated_planner(config)
        self.wire_dtype = torch_dtype(config.policy.wire)
        if config.policy.wire_source == "main_copies":
            self._planner = replace(self._planner, ranges=_all_ranges(actor))
        everyone = [""] * dist.get_world_size()
        dist.all_gather_object(everyone, self._planner.fingerprint)
        if len(set(everyone)) > 1:
            raise PlanError(f"ranks plan for different layouts; fingerprints by rank: {everyone}")
        self.bind()

    def bind(self) -> None:
        """Bind the plan to the current tensors; the plan itself is kept.

        Raises:
            PlanError: where a side has another layout than planned.
        """
        firsts: dict[str, int] = {}
        if self._planner.ranges is None:
            sources = self._actor.weights.live()
        else:
            copies = self._actor.weights.main_copies()
            sources, firsts = copies.held, copies.firsts
        self.transfer = self._engine.connect(
            self._planner,
            sources,
            wire=self.wire_dtype,
            dtype=torch_dtype(self._config.policy.rollout_params),
            batch_bytes=self._config.sync.batch_mib * 2**20,
            firsts=firsts,
        )
        self._bound_to = self._addresses()

    def _addresses(self) -> list[tuple[int, torch.Size]]:
        """Return address and shape of this rank's tensors; offloading and waking move them."""
        found = list(self._actor.model.module.parameters())
        if self._planner.ranges is not None:
            copies = (self._actor.optimizer.main_copy(parameter) for parameter in found)
            found += [copy.values for copy in copies if copy is not None]
        engine = self.transfer.engine
        found += [p.live for p in engine.parameters if not p.staged] if engine else []
        return [(tensor.data_ptr(), tensor.shape) for tensor in found]

    def push(self, weight_version: int) -> SyncResult:
        """Push the trainer's weights into the engine under a new version, and prove the push.

        If tensors moved since the last push, the plan is bound to them again first.

        Raises:
            WeightSyncError: lists every region that differs, on any rank.
            PlanError: where a side has another layout than planned.
        """
        begin = time.perf_counter()
        if self._addresses() != self._bound_to:
            self.bind()
        self._engine.update_weights(weight_version)
        return self.prove(weight_version, begin)

    def prove(self, weight_version: int, begin: float | None = None) -> SyncResult:
        """Compare both sides without a push.

        Args:
            begin: `time.perf_counter()` at the start of the push; None where there was none.

        Raises:
            WeightSyncError: see `push`.
        """
        middle = time.perf_counter()
        proof = self.transfer.prove()
        everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, proof.differing)
        problems = [f"rank {r}: {line}" for r, found in enumerate(everyone) for line in found]
        if problems:
            raise WeightSyncError(
                f"after sync {weight_version} the engine's kernels read other weights than the "
                "trainer's:\n  " + "\n  ".join(problems)
            )
        end = time.perf_counter()
        return SyncResult(
            end - (middle if begin is None else begin),
            end - middle,
            self.transfer.transport.bytes,
            self.transfer.transport.received_bytes,
            proof.regions,
        )
