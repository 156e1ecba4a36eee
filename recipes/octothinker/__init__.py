"""OctoThinker-3B, the paper's run of another architecture (README.md has its numbers)."""

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

# Llama 3.2 3B, which OctoThinker continues.
LLAMA_3B = ModelConfig(
    model_type="llama", vocab_size=128256, hidden_size=3072, intermediate_size=8192,
    num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8, head_dim=128,
    rope_theta=500000.0, rope_scaling_factor=32.0, rms_norm_eps=1e-5, tie_word_embeddings=True,
    initializer_range=0.02, max_position_embeddings=131072,
)  # fmt: skip
LAYOUTS: Layouts = {
    Size(8, 80): layout(8, tp=2, rollout_tp=1, kv_gib=24),
    Size(16, 80): layout(16, tp=2, rollout_tp=1, kv_gib=28),
    Size(32, 80): layout(32, tp=2, rollout_tp=1, kv_gib=28),
    Size(8, 141): layout(8, tp=2, rollout_tp=1, kv_gib=64),
}
DEFAULT = Size(8, 80)


def octothinker_3b(precision: str = "fp16", chosen: Layout = LAYOUTS[DEFAULT]) -> RunConfig:
    """GRPO on OctoThinker-3B-Hybrid-Base (Llama): 128 × 8 rollouts, responses of 3,000 tokens.

    The user's files: `task.train_sets` (MATH), `task.eval_sets` and `start.checkpoint`.

    Args:
        precision: the policy's name; nothing else in the result depends on it.
        chosen: a row of `LAYOUTS`.
    """
    return RunConfig(
        recipe="octothinker.octothinker_3b",
        precision=precision,
        model=LLAMA_3B,
        parallel=chosen.parallel,
        task=TaskConfig(name="chat", max_prompt_tokens=1024, scorer="math"),
        start=StartConfig(kind="checkpoint", public_name="OctoThinker/OctoThinker-3B-Hybrid-Base"),
        rollout=RolloutConfig(
            max_response_tokens=3000,
            max_num_seqs=chosen.max_num_seqs,
            kv_cache_mib=chosen.kv_cache_mib,
        ),
        algo=AlgorithmConfig(name="PPO"),
        optimizer=OptimizerConfig(learning_rate=1e-6, beta1=0.9, beta2=0.95, eps=1e-15),
        train=TrainConfig(
            iterations=300,
            prompts_per_iteration=128,
            rollouts_per_prompt=8,
            prompts_per_mini_batch=32,
            micro_batch_tokens=2 * (1024 + 3000),  # the two longest, or many short ones
        ),
        eval=EvalConfig(every=10, samples_per_question=8, temperature=0.6, top_p=1.0),
        memory=MemoryConfig(recompute="full", attention="fused"),
    )
