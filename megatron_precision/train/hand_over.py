"""Trainer and engine share one GPU in turns: who steps aside, and in which order they come back.

    rollouts done   the engine gives back its KV cache (and weights); the trainer comes back
    before a sync   the engine's weights come back: both sides hold weights, no KV cache
    after a sync    the trainer steps aside, then the KV cache comes back

So the largest things, the optimizer's state and the KV cache, are never there together after the
first iteration. What steps aside is `memory.engine_sleep` and `memory.offload_trainer`; with
neither, nothing here does anything. Whoever reads the trainer's state does so between
`to_trainer` and `to_engine`, or in `trainer_present`: outside of them it may not be there. Both
are for GPUs, and have run on one where the engine keeps its weights (docs/gpu.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from megatron_precision.config import RunConfig
from megatron_precision.platform import startup
from megatron_precision.train.session import Session


class HandOver:
    """Moves the sides of a session out of each other's way."""

    def __init__(self, session: Session, config: RunConfig) -> None:
        self._session = session
        self._offload = config.memory.offload_trainer
        self._shared = config.memory.engine_sleep != "off"
        self._engine_forgets = config.memory.engine_sleep == "drop_weights"
        self._from_main_copies = config.policy.wire_source == "main_copies"
        self._trainer_is_aside = False

    def to_trainer(self) -> None:
        """After the rollouts: the engine sleeps, the trainer's state is on the device again."""
        self._session.engine.sleep()
        if not self._trainer_is_aside:
            return
        for buffer in self._buffers():
            buffer.reload_from_cpu()
        self._session.actor.optimizer.come_back()
        self._trainer_is_aside = False
        if self._from_main_copies:
            # The copies came back to another place than the sync is bound to.
            self._session.sync.bind()

    def before_sync(self) -> None:
        """The engine's weights are where they were, to be written."""
        self._give_back_cached()
        self._session.engine.wake("weights")

    def to_engine(self) -> None:
        """After a sync: the trainer steps aside and the engine has its KV cache again."""
        if self._offload:
            self._session.actor.optimizer.step_aside()
            for buffer in self._buffers():
                buffer.offload_to_cpu()
            self._trainer_is_aside = True
        self._give_back_cached()
        self._session.engine.wake("kv_cache")

    @contextmanager
    def trainer_present(self) -> Iterator[None]:
        """The trainer's state is on the device for as long as the block runs."""
        if not self._trainer_is_aside:
            yield
            return
        self.to_trainer()
        try:
            yield
        finally:
            self.before_sync()
            if self._engine_forgets:
                self._session.sync.push(self._session.engine.weight_version)
            self.to_engine()

    def _give_back_cached(self) -> None:
        """What PyTorch keeps of freed memory goes to the driver, where the engine's is taken."""
        if self._shared and startup.device().type == "cuda":
            torch.cuda.empty_cache()

    def _buffers(self) -> list[Any]:
        model = self._session.actor.model
        return [*model.buffers, *model.expert_parallel_buffers]
