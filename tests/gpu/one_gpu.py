"""What the tests of one GPU share: cases, and the marks that multiply them."""

from __future__ import annotations

import pytest
import torch

from megatron_precision.config.schema import (
    KernelConfig,
    LossScaleConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from tests.distributed.cases import Case
from tests.distributed.engine_worlds import DENSE, MOE
from tests.distributed.oracle import checkpoint, random_batch, random_hf_model

ONE = ParallelConfig(world_size=1, tp_size=1, rollout_tp_size=1)
MODELS = {"dense": DENSE, "MoE": MOE}
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
every_model = pytest.mark.parametrize("model", list(MODELS))
both_dtypes = pytest.mark.parametrize("precision", list(DTYPES))


def case(
    model: ModelConfig, precision: str, trainer: str = "transformer_engine", packed: bool = False
) -> Case:
    config = RunConfig(
        "test",
        precision=precision,
        model=model,
        parallel=ONE,
        optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-8),
        loss_scale=LossScaleConfig("fixed_start", initial_scale=64.0),
        train=TrainConfig(micro_batch_size=3, packed_sequences=packed),
        memory=MemoryConfig(attention="fused"),
        kernels=KernelConfig(trainer=trainer),  # type: ignore[arg-type]
    )
    return Case(config, checkpoint(model, random_hf_model(model, 0.1)), random_batch(model, 6))
