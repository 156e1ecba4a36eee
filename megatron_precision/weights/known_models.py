"""Shapes of models that plans are made for by name; a run reads its own model's `config.json`."""

from __future__ import annotations

import dataclasses

from megatron_precision.config import ModelConfig

QWEN3_14B = ModelConfig(
    model_type="qwen3", vocab_size=151936, hidden_size=5120, intermediate_size=17408,
    num_hidden_layers=40, num_attention_heads=40, num_key_value_heads=8, head_dim=128,
    rope_theta=1e6, max_position_embeddings=40960, initializer_range=0.02,
)  # fmt: skip
QWEN3_30B_A3B = ModelConfig(
    model_type="qwen3_moe", vocab_size=151936, hidden_size=2048, intermediate_size=6144,
    num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128,
    rope_theta=1e6, max_position_embeddings=40960, initializer_range=0.02,
    num_experts=128, num_experts_per_tok=8, moe_intermediate_size=768,
)  # fmt: skip
# Sources: the config.json of Qwen/Qwen3-14B, Qwen3-30B-A3B and Qwen3-235B-A22B.
KNOWN_MODELS = {
    "qwen3-14b": QWEN3_14B,
    "qwen3-30b-a3b": QWEN3_30B_A3B,
    "qwen3-235b-a22b": dataclasses.replace(
        QWEN3_30B_A3B, hidden_size=4096, intermediate_size=12288, num_hidden_layers=94,
        num_attention_heads=64, moe_intermediate_size=1536,
    ),
}  # fmt: skip
