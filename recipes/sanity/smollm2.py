"""The sanity test on a real pretrained model that one GPU trains: SmolLM2-135M-Instruct, sums."""

from __future__ import annotations

from megatron_precision.config.schema import (
    AlgorithmConfig,
    EvalConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    StartConfig,
    TaskConfig,
    TrainConfig,
)

SMOLLM2_135M = ModelConfig(
    model_type="llama", vocab_size=49152, hidden_size=576, intermediate_size=1536,
    num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, head_dim=64,
    rms_norm_eps=1e-5, rope_theta=100000.0, initializer_range=0.0417, tie_word_embeddings=True,
    max_position_embeddings=8192,
)  # fmt: skip


def smollm2(precision: str = "fp16") -> RunConfig:
    """SmolLM2-135M-Instruct on sums of two numbers, 64 × 8 rollouts, PG-Seq-IS, one GPU.

    The user's files are made by `benchmarks/smollm2_sums.py`, and its perfectible set by
    `python -m megatron_precision perfectible`: the README has the commands.

    Args:
        precision: the policy's name; nothing else in the result depends on it.
    """
    return RunConfig(
        recipe="sanity.smollm2",
        precision=precision,
        model=SMOLLM2_135M,
        parallel=ParallelConfig(world_size=1, tp_size=1, rollout_tp_size=1),
        task=TaskConfig(name="chat", max_prompt_tokens=64, scorer="number"),
        start=StartConfig(kind="checkpoint", public_name="HuggingFaceTB/SmolLM2-135M-Instruct"),
        rollout=RolloutConfig(max_response_tokens=128, max_num_seqs=512, kv_cache_mib=8192),
        algo=AlgorithmConfig(name="PG-Seq-IS"),
        # The paper's, but for the rate: a tenth of its weights want steps of ten times the size.
        optimizer=OptimizerConfig(learning_rate=1e-5, beta1=0.9, beta2=0.95, eps=1e-15),
        train=TrainConfig(
            iterations=300,
            prompts_per_iteration=64,
            rollouts_per_prompt=8,
            prompts_per_mini_batch=16,
            micro_batch_tokens=128 * (64 + 128),
        ),
        eval=EvalConfig(every=20, samples_per_question=8, temperature=0.6),
        memory=MemoryConfig(attention="fused"),
    )
