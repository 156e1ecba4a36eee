"""The paper's sanity test at its own size: DeepSeek-R1-Distill-Qwen-1.5B on perfectible MATH."""

from __future__ import annotations

from megatron_precision.config.schema import (
    AlgorithmConfig,
    EvalConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    RolloutConfig,
    RunConfig,
    StartConfig,
    TaskConfig,
    TrainConfig,
)
from recipes.layouts import Layout, Layouts, Size, layout

R1_DISTILL_QWEN_1_5B = ModelConfig(
    model_type="qwen2", vocab_size=151936, hidden_size=1536, intermediate_size=8960,
    num_hidden_layers=28, num_attention_heads=12, num_key_value_heads=2, head_dim=128,
    rope_theta=10000.0, initializer_range=0.02, max_position_embeddings=131072,
)  # fmt: skip
LAYOUTS: Layouts = {
    Size(8, 80): layout(8, tp=2, rollout_tp=1, kv_gib=20),
    Size(16, 80): layout(16, tp=2, rollout_tp=1, kv_gib=20),
    Size(32, 80): layout(32, tp=2, rollout_tp=1, kv_gib=20),
    Size(8, 141): layout(8, tp=2, rollout_tp=1, kv_gib=48),
}
DEFAULT = Size(8, 80)


def r1d_1_5b(precision: str = "fp16", chosen: Layout = LAYOUTS[DEFAULT]) -> RunConfig:
    """The paper's sanity test: R1-Distill-Qwen-1.5B, 64 × 8 rollouts, PG-Seq-IS by default.

    The user's files: `task.train_sets` (the 1,460 perfectible questions of MATH, which
    `python -m megatron_precision perfectible` makes), `task.eval_sets` (AIME 2024 and 2025) and
    `start.checkpoint`.

    Args:
        precision: the policy's name; nothing else in the result depends on it.
        chosen: a row of `LAYOUTS`.
    """
    return RunConfig(
        recipe="sanity.r1d_1_5b",
        precision=precision,
        model=R1_DISTILL_QWEN_1_5B,
        parallel=chosen.parallel,
        task=TaskConfig(name="chat", max_prompt_tokens=1024, scorer="math"),
        start=StartConfig(
            kind="checkpoint", public_name="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
        ),
        rollout=RolloutConfig(
            max_response_tokens=8192,
            max_num_seqs=chosen.max_num_seqs,
            kv_cache_mib=chosen.kv_cache_mib,
        ),
        algo=AlgorithmConfig(name="PG-Seq-IS"),
        optimizer=OptimizerConfig(learning_rate=1e-6, beta1=0.9, beta2=0.95, eps=1e-15),
        # 20 epochs of 1,460 questions, 64 an iteration.
        train=TrainConfig(
            iterations=456,
            prompts_per_iteration=64,
            rollouts_per_prompt=8,
            prompts_per_mini_batch=16,
            micro_batch_tokens=1024 + 8192,  # the longest sequence, or many short ones
        ),
        eval=EvalConfig(every=20, samples_per_question=32, temperature=0.6, top_p=1.0),
        memory=MemoryConfig(recompute="full", attention="fused"),
    )
