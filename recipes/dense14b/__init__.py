"""Dense-14B: DAPO on Qwen3-14B-Base, the paper's large dense run (README.md has its numbers)."""

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
from megatron_precision.layouts.architectures import QWEN3_14B
from recipes.layouts import Layout, Layouts, Size, layout

LAYOUTS: Layouts = {
    Size(8, 80): layout(8, tp=8, rollout_tp=8, kv_gib=16),
    Size(16, 80): layout(16, tp=8, rollout_tp=8, kv_gib=24),
    Size(32, 80): layout(32, tp=8, rollout_tp=8, kv_gib=28),
    Size(8, 141): layout(8, tp=8, rollout_tp=8, kv_gib=56),
}
DEFAULT = Size(8, 80)


def dapo(precision: str = "fp16", chosen: Layout = LAYOUTS[DEFAULT]) -> RunConfig:
    """DAPO on Qwen3-14B-Base: dual clip 10, 512 × 16 rollouts, 2,048 + 20,480 tokens.

    The user's files: `task.train_sets` (the paper has 54.4k math problems) and `task.eval_sets`
    (AIME 2024), and `start.checkpoint`.

    Args:
        precision: the policy's name; nothing else in the result depends on it.
        chosen: a row of `LAYOUTS`.
    """
    return RunConfig(
        recipe="dense14b.dapo",
        precision=precision,
        # The base model's positions; those of the chat model in the table are 40,960.
        model=dataclasses.replace(QWEN3_14B, max_position_embeddings=32768),
        parallel=chosen.parallel,
        # DAPO has its penalty for what is too long, and grades the text.
        task=TaskConfig(name="chat", max_prompt_tokens=2048, scorer="math", truncated="graded"),
        start=StartConfig(kind="checkpoint", public_name="Qwen/Qwen3-14B-Base"),
        rollout=RolloutConfig(
            max_response_tokens=20480,
            max_num_seqs=chosen.max_num_seqs,
            kv_cache_mib=chosen.kv_cache_mib,
        ),
        algo=AlgorithmConfig(name="DAPO", clip_low=0.2, clip_high=0.28, dual_clip=10.0),
        optimizer=OptimizerConfig(
            learning_rate=1e-6, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.1, warmup_steps=10
        ),
        train=TrainConfig(
            iterations=85,
            prompts_per_iteration=512,
            rollouts_per_prompt=16,
            prompts_per_mini_batch=32,
            micro_batch_tokens=2048 + 20480,  # the longest sequence, or many short ones
        ),
        eval=EvalConfig(every=5, samples_per_question=8, temperature=1.0, top_p=0.7),
        memory=MemoryConfig(recompute="full", attention="fused"),
    )
