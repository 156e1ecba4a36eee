"""What a job holds: the trainer, the engine, the sync between them, and the task.

Made in the one order that works: `platform.startup.start` for the process, then world and trainer
(`Session`), weights (`load_start`), engine and sync (`open_engine`), audit and proof (`check`).
"""

from __future__ import annotations

import gc
import resource
from pathlib import Path

import torch

from megatron_precision.actor import parallel
from megatron_precision.actor.actor import Actor
from megatron_precision.actor.batch import make_batch
from megatron_precision.config import LossScaleConfig, OptimizerConfig, RunConfig
from megatron_precision.data.tasks import Task
from megatron_precision.platform import startup, support
from megatron_precision.precision import audit
from megatron_precision.rollout.sampling import Sampler
from megatron_precision.rollout.vllm_engine import VllmEngine
from megatron_precision.train.objective import supervised_objective
from megatron_precision.train.rollouts import TaskSampler
from megatron_precision.weights.hf_model import OpenCheckpoint
from megatron_precision.weights.proof import prove_sync
from megatron_precision.weights.sync import WeightSync


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
        support.check(config)
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
        self.rollouts = TaskSampler(self.task, self.sampler, length)
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
        # What was made so far lives as long as the job: no collection needs to walk it again.
        gc.collect()
        gc.freeze()
        return found

    def _pass_readings(self, prompts: list[list[int]]) -> list[audit.Reading]:
        """dtypes seen in one real forward and backward pass; gradients are dropped after it."""
        heads, tails = [p[:1] for p in prompts], [p[1:] for p in prompts]
        zeros = [[0.0] * len(tail) for tail in tails]
        batch = make_batch(heads, tails, zeros, torch.ones(len(prompts)))
        plan = self.actor.plan(batch, torch.arange(len(batch)))
        with audit.ForwardReadings(self.actor.model) as watch:
            self.actor.gradients(batch, plan, supervised_objective(batch))
        self.actor.model.zero_grad_buffer()
        return watch.readings

    def close(self) -> None:
        """End what grades."""
        self.rollouts.close()


def peak_memory_gib() -> float:
    """Largest resident set of this process so far, in GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
