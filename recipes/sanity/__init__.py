"""The paper's sanity test in small: tiny models that two CPU cores train from a shared start.

Everything that the two recipes choose for themselves stands in this file; the rest is the
default that `megatron_precision/config/schema.py` documents.
"""

from __future__ import annotations

import dataclasses

from megatron_precision.config.schema import (
    AlgorithmConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
)

# The paper's optimizer, but for the rate: its 1e-6 moves a 1.5B model over 20 epochs; a model of
# 0.4M weights that trains for minutes needs one that moves it.
OPTIMIZER = OptimizerConfig(learning_rate=1e-4, beta1=0.9, beta2=0.95, eps=1e-15, warmup_steps=4)
TASK = TaskConfig(difficulty=8, train_questions=192, eval_questions=64)


def tiny_dense(precision: str = "fp16") -> RunConfig:
    """Qwen3 dense model; trainer TP = 2, rollout TP = 2, on two processes.

    Args:
        precision: the policy's name; nothing else in the result depends on it.
    """
    return RunConfig(
        recipe="sanity.tiny_dense",
        precision=precision,
        model=ModelConfig(),
        task=TASK,
        algo=AlgorithmConfig(name="PPO"),
        optimizer=OPTIMIZER,
        parallel=ParallelConfig(world_size=2, tp_size=2, rollout_tp_size=2),
        # Both runs, with what they start from, within 15 minutes on two cores without AVX-512.
        train=TrainConfig(iterations=32),
        eval=EvalConfig(every=8),
    )


def tiny_moe(precision: str = "fp16") -> RunConfig:
    """Qwen3-MoE model, 8 experts, top-2; trainer EP = 2 over DP = 2, rollout TP = 2.

    Args:
        precision: the policy's name; nothing else in the result depends on it.
    """
    dense = tiny_dense(precision)
    return dataclasses.replace(
        dense,
        recipe="sanity.tiny_moe",
        model=dataclasses.replace(
            dense.model,
            model_type="qwen3_moe",
            num_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=128,
        ),
        parallel=ParallelConfig(world_size=2, tp_size=1, ep_size=2, rollout_tp_size=2),
    )
