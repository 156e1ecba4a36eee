"""Describes each supported architecture by its `model_type`, and lists the tensors of a model.

One row of `ARCHITECTURES` describes an architecture. The actor's model, the weight sync and the
checkpoint converter all read this table; there is no other. `hf_config.py` reads a checkpoint's
`config.json` into a `ModelConfig` and refuses what no row describes.

`KNOWN_MODELS` gives the sizes of models that a plan may name; a run reads its own model's
`config.json`.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from megatron_precision.config.schema import ModelConfig


@dataclass(frozen=True)
class Architecture:
    """The features by which a decoder differs from the others.

    All of them have RMSNorm before attention and MLP, rotary embeddings, grouped-query attention
    and a gated SiLU MLP without biases.

    Attributes:
        hf_class: the name in `architectures` of a checkpoint's `config.json`.
        qk_norm: an RMSNorm over each head of the queries and keys.
        qkv_bias: biases of the query, key and value projections.
        experts: the MLP of every layer is a mixture of experts with a linear router.
        derived: fields of `config.json` that may be left out, because transformers derives them:
            `num_key_value_heads` (the query heads), `head_dim` (the hidden size over them). Where
            it has a number of its own instead (Qwen3: heads of 128), the field must be there.
        derived_from_null: those that may be null, and mean the same.
    """

    hf_class: str
    qk_norm: bool = False
    qkv_bias: bool = False
    experts: bool = False
    derived: frozenset[str] = frozenset()
    derived_from_null: frozenset[str] = frozenset()


_KV_HEADS, _WIDTH = "num_key_value_heads", "head_dim"
ARCHITECTURES: dict[str, Architecture] = {
    "qwen3": Architecture(
        "Qwen3ForCausalLM", qk_norm=True, derived_from_null=frozenset({_KV_HEADS})
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM", qk_norm=True, experts=True, derived=frozenset({_WIDTH})
    ),
    "qwen2": Architecture(
        "Qwen2ForCausalLM",
        qkv_bias=True,
        derived=frozenset({_WIDTH}),
        derived_from_null=frozenset({_KV_HEADS}),
    ),
    "llama": Architecture(
        "LlamaForCausalLM",
        derived=frozenset({_KV_HEADS, _WIDTH}),
        derived_from_null=frozenset({_KV_HEADS, _WIDTH}),
    ),
}


def architecture(model: ModelConfig) -> Architecture:
    """Return the model's row of `ARCHITECTURES`."""
    return ARCHITECTURES[model.model_type]


def hf_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor of the model's Hugging Face checkpoint, by name."""
    hidden, d, has = model.hidden_size, model.head_dim, architecture(model)
    q, kv = model.num_attention_heads * d, model.num_key_value_heads * d
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (model.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not model.tie_word_embeddings:
        shapes["lm_head.weight"] = (model.vocab_size, hidden)
    for i in range(model.num_hidden_layers):
        layer = f"model.layers.{i}"
        shapes |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (q, hidden),
            f"{layer}.self_attn.k_proj.weight": (kv, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, q),
        }
        if has.qkv_bias:
            biases = {"q_proj": q, "k_proj": kv, "v_proj": kv}
            shapes |= {f"{layer}.self_attn.{n}.bias": (size,) for n, size in biases.items()}
        if has.qk_norm:
            shapes |= {f"{layer}.self_attn.{n}.weight": (d,) for n in ("q_norm", "k_norm")}
        if not has.experts:
            shapes |= _mlp_shapes(f"{layer}.mlp", model.intermediate_size, hidden)
            continue
        shapes[f"{layer}.mlp.gate.weight"] = (model.num_experts, hidden)
        for expert in range(model.num_experts):
            shapes |= _mlp_shapes(
                f"{layer}.mlp.experts.{expert}", model.moe_intermediate_size, hidden
            )
    return shapes


def _mlp_shapes(prefix: str, inner: int, hidden: int) -> dict[str, tuple[int, ...]]:
    return {
        f"{prefix}.gate_proj.weight": (inner, hidden),
        f"{prefix}.up_proj.weight": (inner, hidden),
        f"{prefix}.down_proj.weight": (hidden, inner),
    }


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
