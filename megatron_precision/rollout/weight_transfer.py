"""Registers the sync as a backend of vLLM's weight transfer, at vLLM's own extension point.

Call `register()`, and choose it with `WeightTransferConfig(backend=BACKEND)`. `sync/transfer.py`
does the work.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from megatron_precision.layouts.megatron import ShardCoordinates
from megatron_precision.layouts.regions import Region
from megatron_precision.rollout.engine_weights import EngineWeights
from megatron_precision.sync.plan import BATCH_BYTES, Planner
from megatron_precision.sync.transfer import Transfer

BACKEND = "megatron_precision"


@dataclass
class PlannedInit(WeightTransferInitInfo):
    """The arguments of `init_weight_transfer_engine`; see `Transfer`."""

    planner: Planner
    sources: list[tuple[Region, torch.Tensor]]
    at: ShardCoordinates
    wire: torch.dtype
    dtype: torch.dtype
    batch_bytes: int = BATCH_BYTES
    firsts: dict[str, int] = field(default_factory=dict)


@dataclass
class PlannedUpdate(WeightTransferUpdateInfo):
    """The arguments of an update: none, since every rank knows the plan."""


class PlannedWeightTransfer(WeightTransferEngine[PlannedInit, PlannedUpdate]):
    """vLLM's side of a sync: init once, then start, update and finish each time."""

    init_info_cls = PlannedInit
    update_info_cls = PlannedUpdate
    supports_draft_weight_update = False
    transfer: Transfer | None = None

    def init_transfer_engine(self, init_info: PlannedInit) -> None:
        """Bind the plan to the live tensors, again whenever one of them has moved."""
        self.transfer = Transfer(
            init_info.planner,
            init_info.sources,
            EngineWeights(self.model, self.model_config),
            init_info.at,
            wire=init_info.wire,
            dtype=init_info.dtype,
            batch_bytes=init_info.batch_bytes,
            firsts=init_info.firsts,
        )

    def start_weight_update(self) -> None:
        """Do nothing: staged layers are prepared one by one."""

    def receive_weights(self, update_info: PlannedUpdate) -> None:
        """Update this rank's engine.

        Raises:
            RuntimeError: before `init_transfer_engine`.
        """
        if self.transfer is None:
            raise RuntimeError("init_weight_transfer_engine has not been called")
        self.transfer.run()

    def finish_weight_update(self) -> None:
        """Do nothing: nothing is left to finish."""

    def shutdown(self) -> None:
        """Drop the references to the trainer's tensors."""
        self.transfer = None

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:
        """Refuse to be called: vLLM 0.26 wants a sending side, and ours is the ranks' own plan.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("weights are pushed by WeightSync.push, on every rank")


def register() -> None:
    """Register the backend with vLLM, once per process."""
    registry: dict[str, Any] = WeightTransferEngineFactory._registry
    if BACKEND not in registry:
        WeightTransferEngineFactory.register_engine(BACKEND, PlannedWeightTransfer)
