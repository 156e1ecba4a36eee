"""The trainer and the engine of one job on this rank, and the turns in which they use the device.

`Session` starts them in the one order that works: `platform.startup.start` for the process, then
world and trainer (`Session`), weights (`load_start`), engine and sync (`open_engine`), audit and
proof (`check`).

`Offloader` lets both fit on one GPU:

    rollouts done   the engine frees its KV cache (and weights); the trainer is reloaded
    before a sync   the engine's weights are woken: both sides have weights, no KV cache
    after a sync    the trainer is offloaded, then the KV cache is allocated again

So the two largest things, optimizer state and KV cache, share the device in the first iteration
alone. `memory.engine_sleep` and `memory.offload_trainer` say what is freed; with both off, nothing
here does anything. Read the trainer's state between `reload_trainer` and `offload_trainer`, or in
`trainer_on_device`: elsewhere it may not be on the device. Both are for GPUs (docs/gpu.md).
"""

from __future__ import annotations

import gc
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from megatron_precision.actor import parallel
from megatron_precision.actor.actor import Actor
from megatron_precision.actor.batch import make_batch
from megatron_precision.checks import platform
from megatron_precision.config.schema import LossScaleConfig, OptimizerConfig, RunConfig
from megatron_precision.data.tasks import Task
from megatron_precision.layouts.hf_files import OpenCheckpoint
from megatron_precision.platform import startup
from megatron_precision.precision import audit
from megatron_precision.rollout.sampling import Sampler
from megatron_precision.rollout.vllm_engine import VllmEngine
from megatron_precision.train.objective import supervised_objective
from megatron_precision.train.rollouts import GroupSampler
from megatron_precision.train.sync_proof import prove_sync
from megatron_precision.train.weight_sync import WeightSync


class Session:
    """Trainer and engine of one job on this rank."""

    def __init__(
        self,
        config: RunConfig,
        optimizer: OptimizerConfig,
        loss_scale: LossScaleConfig,
        model_dir: Path,
        task: Task,
        collective_timeout_s: float = parallel.COLLECTIVE_TIMEOUT_S,
    ) -> None:
        platform.check(config)
        parallel.open_world(startup.backend(), collective_timeout_s)
        parallel.divide_world(config.parallel, config.seed)
        self.config = config
        self.task = task
        self.actor = Actor(config, optimizer, loss_scale)
        self.model_dir = model_dir

    def load_start(self) -> None:
        """Load the trainer's weights from the model folder."""
        self.actor.weights.load(OpenCheckpoint(self.model_dir))

    def open_engine(self) -> None:
        """Start the engine on the model folder, and connect the sync."""
        self.engine = VllmEngine(self.config, self.model_dir, self.task.stop_ids)
        self.sampler = Sampler(self.engine, self.config)
        length = self.config.rollout.max_response_tokens
        self.rollouts = GroupSampler(self.task, self.sampler, length)
        self.sync = WeightSync(self.actor, self.engine, self.config)

    def check(self) -> dict[str, str]:
        """Audit every dtype and prove the sync, on a few real sequences.

        Returns:
            The dtype found for each kind of tensor.

        Raises:
            PrecisionAuditError: listing tensors that disagree with the policy.
            WeightSyncError: where the engine does not hold what was pushed.
        """
        prompts = [list(tokens) for tokens in self.task.check_sequences]
        # Every data-parallel rank has as many.
        dp_size = self.config.parallel.dp_size
        prompts = prompts[: len(prompts) // dp_size * dp_size] or prompts * dp_size
        self.sync.push(self.engine.weight_version)
        prove_sync(self.sync, self.engine, self.actor, prompts)
        readings = [
            *audit.read_trainer(self.actor.model, self.actor.optimizer.megatron),
            *self._pass_readings(prompts),
            *audit.read_engine(self.engine),
            audit.Reading("wire", "weights on the wire", self.sync.wire_dtype),
        ]
        found = audit.check(readings, self.config.policy)
        # These objects live as long as the job: no garbage collection needs to visit them again.
        gc.collect()
        gc.freeze()
        return found

    def _pass_readings(self, prompts: list[list[int]]) -> list[audit.Reading]:
        """Read dtypes in one real forward and backward pass; its gradients are dropped."""
        heads, tails = [p[:1] for p in prompts], [p[1:] for p in prompts]
        zeros = [[0.0] * len(tail) for tail in tails]
        batch = make_batch(heads, tails, zeros, torch.ones(len(prompts)))
        plan = self.actor.plan(batch, torch.arange(len(batch)))
        with audit.ForwardReadings(self.actor.model) as watch:
            self.actor.gradients(batch, plan, supervised_objective(batch))
        self.actor.model.zero_grad_buffer()
        return watch.readings

    def close(self) -> None:
        """Stop the processes that grade."""
        self.rollouts.close()


def peak_memory_gib() -> float:
    """Return the largest resident set of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Offloader:
    """Offloads and reloads trainer and engine so that both fit on one GPU."""

    def __init__(self, session: Session, config: RunConfig) -> None:
        self._session = session
        self._offload = config.memory.offload_trainer
        self._shared = config.memory.engine_sleep != "off"
        self._engine_forgets = config.memory.engine_sleep == "drop_weights"
        self._from_main_copies = config.policy.wire_source == "main_copies"
        self._trainer_is_offloaded = False

    def reload_trainer(self) -> None:
        """Put the engine to sleep after the rollouts, and reload the trainer."""
        self._session.engine.sleep()
        if not self._trainer_is_offloaded:
            return
        for buffer in self._buffers():
            buffer.reload_from_cpu()
        self._session.actor.optimizer.come_back()
        self._trainer_is_offloaded = False
        if self._from_main_copies:
            # The main copies have new addresses; the sync is bound to the old ones.
            self._session.sync.bind()

    def wake_engine_weights(self) -> None:
        """Allocate the engine's weights at their old addresses, for a sync to write."""
        self._empty_cache()
        self._session.engine.wake("weights")

    def offload_trainer(self) -> None:
        """Offload the trainer after a sync, and allocate the engine's KV cache."""
        if self._offload:
            self._session.actor.optimizer.step_aside()
            for buffer in self._buffers():
                buffer.offload_to_cpu()
            self._trainer_is_offloaded = True
        self._empty_cache()
        self._session.engine.wake("kv_cache")

    @contextmanager
    def trainer_on_device(self) -> Iterator[None]:
        """Reload the trainer for a block, and restore the engine after it."""
        if not self._trainer_is_offloaded:
            yield
            return
        self.reload_trainer()
        try:
            yield
        finally:
            self.wake_engine_weights()
            if self._engine_forgets:
                self._session.sync.push(self._session.engine.weight_version)
            self.offload_trainer()

    def _empty_cache(self) -> None:
        """Return PyTorch's freed memory to the driver, from which the engine allocates."""
        if self._shared and startup.device().type == "cuda":
            torch.cuda.empty_cache()

    def _buffers(self) -> list[Any]:
        model = self._session.actor.model
        return [*model.buffers, *model.expert_parallel_buffers]
