"""MoE: three algorithms on Qwen3-30B-A3B-Base, the paper's MoE runs (README.md has its numbers)."""

from __future__ import annotations

import dataclasses

from megatron_precision.config.schema import (
    AlgorithmConfig,
    EvalConfig,
    MemoryConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    StartConfig,
    TaskConfig,
    TrainConfig,
)
from megatron_precision.layouts.architectures import QWEN3_30B_A3B
from recipes.layouts import Layout, Layouts, Size, layout

# Four KV heads bound the trainer's TP by 4. No layout of 8 GPUs of 80 GB holds the optimizer's
# 12 bytes a parameter (46 GB a rank) beside parameters, gradients and engine.
LAYOUTS: Layouts = {
    Size(16, 80): layout(16, tp=4, pp=2, ep=8, rollout_tp=8, kv_gib=4),
    Size(32, 80): layout(32, tp=4, pp=4, ep=8, rollout_tp=8, kv_gib=14),
    Size(8, 141): layout(8, tp=4, ep=8, rollout_tp=8, kv_gib=14),
}
DEFAULT = Size(32, 80)


def grpo_seq_mis(precision: str = "fp16", chosen: Layout = LAYOUTS[DEFAULT]) -> RunConfig:
    """GRPO-Seq-MIS on Qwen3-30B-A3B-Base; sequences with ratio above 3 carry no gradient.

    Args:
        precision: the policy's name; nothing else in the result depends on it.
        chosen: a row of `LAYOUTS`.
    """
    return _recipe("moe.grpo_seq_mis", "PPO-Seq-MIS", 155, precision, chosen)


def grpo_token_tis(precision: str = "fp16", chosen: Layout = LAYOUTS[DEFAULT]) -> RunConfig:
    """GRPO-Token-TIS on Qwen3-30B-A3B-Base; a weight a token, truncated at 3.

    Args:
        precision: the policy's name; nothing else in the result depends on it.
        chosen: a row of `LAYOUTS`.
    """
    return _recipe("moe.grpo_token_tis", "PPO-Token-TIS", 200, precision, chosen)


def pg_seq_tis(precision: str = "fp16", chosen: Layout = LAYOUTS[DEFAULT]) -> RunConfig:
    """PG-Seq-TIS on Qwen3-30B-A3B-Base; no old-log-prob pass.

    Args:
        precision: the policy's name; nothing else in the result depends on it.
        chosen: a row of `LAYOUTS`.
    """
    return _recipe("moe.pg_seq_tis", "PG-Seq-TIS", 150, precision, chosen)


def _recipe(
    name: str, algorithm: str, iterations: int, precision: str, chosen: Layout
) -> RunConfig:
    """What the three have in common: all but the algorithm and how long the paper plots it.

    The user's files: `task.train_sets`, `task.eval_sets` (AIME 2024) and `start.checkpoint`.
    """
    return RunConfig(
        recipe=name,
        precision=precision,
        # The base model's positions; those of the chat model in the table are 40,960.
        model=dataclasses.replace(QWEN3_30B_A3B, max_position_embeddings=32768),
        parallel=chosen.parallel,
        task=TaskConfig(name="chat", max_prompt_tokens=2048, scorer="math"),
        start=StartConfig(kind="checkpoint", public_name="Qwen/Qwen3-30B-A3B-Base"),
        rollout=RolloutConfig(
            max_response_tokens=20480,
            max_num_seqs=chosen.max_num_seqs,
            kv_cache_mib=chosen.kv_cache_mib,
        ),
        algo=AlgorithmConfig(
            name=algorithm, clip_low=0.2, clip_high=0.28, correction_threshold=3.0
        ),
        optimizer=OptimizerConfig(learning_rate=1e-6, beta1=0.9, beta2=0.95, eps=1e-15),
        train=TrainConfig(
            iterations=iterations,
            prompts_per_iteration=512,
            rollouts_per_prompt=16,
            prompts_per_mini_batch=32,
            micro_batch_tokens=2048 + 20480,  # the longest sequence, or many short ones
        ),
        eval=EvalConfig(every=5, samples_per_question=8, temperature=0.6, top_p=1.0),
        memory=MemoryConfig(recompute="full", attention="fused"),
    )
