"""Qwen3 and Qwen3-MoE: where each Hugging Face tensor lies in Megatron and in vLLM.

One description of the layout, read by the actor (loading), by the weight sync (both ends) and
by the checkpoint export. The Megatron names are those of the local layer spec.

Layouts that are not one-to-one:
    linear_qkv   Megatron stores, per KV group, `[q … q | k | v]`; Hugging Face three tensors;
                 vLLM `[Q | K | V]` of the rank's heads.
    linear_fc1   `[gate | up]` inside each tensor-parallel rank, in Megatron and in vLLM.
    experts      one module an expert in Megatron; stacked `w13 [E, 2I, H]`, `w2 [E, H, I]` in vLLM.
    vocabulary   padded rows exist on both sides and belong to no Hugging Face tensor.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from megatron_precision.config import ModelConfig
from megatron_precision.weights.regions import Piece, rows, split, whole


@dataclass(frozen=True)
class ShardCoordinates:
    """Where one rank stands in its side's layout.

    Attributes:
        tp_rank, tp_size: tensor parallelism of the dense layers.
        etp_rank, etp_size: tensor parallelism inside an expert.
        first_expert: global number of the rank's first local expert.
        first_layer: global number of the rank's first layer (pipeline parallelism).
    """

    tp_rank: int = 0
    tp_size: int = 1
    etp_rank: int = 0
    etp_size: int = 1
    first_expert: int = 0
    first_layer: int = 0


def hf_config(model: ModelConfig, dtype: str) -> dict[str, object]:
    """The `config.json` of the model, as transformers and vLLM read it.

    Args:
        dtype: torch's name of the stored dtype, for example `float32`.
    """
    config: dict[str, object] = {
        "architectures": ["Qwen3MoeForCausalLM" if model.num_experts else "Qwen3ForCausalLM"],
        "model_type": model.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_word_embeddings,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
    }
    if model.num_experts:
        config |= {
            "num_experts": model.num_experts,
            "num_experts_per_tok": model.num_experts_per_tok,
            "moe_intermediate_size": model.moe_intermediate_size,
            "norm_topk_prob": model.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "output_router_logits": False,
            "router_aux_loss_coef": 0.0,
        }
    return config


def hf_shapes(model: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of the Hugging Face checkpoint, with its shape."""
    hidden, d = model.hidden_size, model.head_dim
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
            f"{layer}.self_attn.q_norm.weight": (d,),
            f"{layer}.self_attn.k_norm.weight": (d,),
        }
        if not model.num_experts:
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


_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight")
_MEGATRON_WHOLE = {
    "input_layernorm.weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.router.weight": "mlp.gate.weight",
}


def megatron_pieces(
    parameter: str, shape: tuple[int, ...], model: ModelConfig, at: ShardCoordinates
) -> list[Piece]:
    """What a Megatron parameter of this rank holds.

    Args:
        parameter: its name in `GPTModel.named_parameters()`.
        shape: its local shape.

    Raises:
        ValueError: for a parameter that this architecture does not have.
    """
    if parameter == "embedding.word_embeddings.weight":
        return _vocabulary_rows("model.embed_tokens.weight", parameter, shape, model, at)
    if parameter == "output_layer.weight":
        # With tied embeddings the last pipeline stage holds a copy of the first stage's.
        tied = model.tie_word_embeddings
        hf_name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        return _vocabulary_rows(hf_name, parameter, shape, model, at)
    if parameter == "decoder.final_layernorm.weight":
        return [whole("model.norm.weight", parameter, shape)]
    match = _LAYER.fullmatch(parameter)
    if match is None:
        raise ValueError(f"unknown Megatron parameter {parameter!r} for {model.model_type}")
    layer, rest = f"model.layers.{int(match[1]) + at.first_layer}", match[2]
    if rest in _MEGATRON_WHOLE:
        return [whole(f"{layer}.{_MEGATRON_WHOLE[rest]}", parameter, shape)]
    if rest == "self_attention.linear_qkv.weight":
        return _interleaved_qkv(f"{layer}.self_attn", parameter, shape, model, at)
    if rest == "self_attention.linear_proj.weight":
        return [split(f"{layer}.self_attn.o_proj.weight", parameter, shape, 1, at.tp_rank)]
    if rest == "mlp.linear_fc1.weight":
        return _gate_up(f"{layer}.mlp", parameter, shape, at.tp_rank)
    if rest == "mlp.linear_fc2.weight":
        return [split(f"{layer}.mlp.down_proj.weight", parameter, shape, 1, at.tp_rank)]
    if expert := _EXPERT.fullmatch(rest):
        prefix = f"{layer}.mlp.experts.{int(expert[1]) + at.first_expert}"
        if expert[2] == "linear_fc1":
            return _gate_up(prefix, parameter, shape, at.etp_rank)
        return [split(f"{prefix}.down_proj.weight", parameter, shape, 1, at.etp_rank)]
    raise ValueError(f"unknown Megatron parameter {parameter!r} for {model.model_type}")


def _vocabulary_rows(
    hf_name: str, parameter: str, shape: tuple[int, ...], model: ModelConfig, at: ShardCoordinates
) -> list[Piece]:
    """Rows of the real vocabulary; a rank that holds padding alone holds no piece."""
    first = at.tp_rank * shape[0]
    count = min(shape[0], model.vocab_size - first)
    return [rows(hf_name, parameter, shape, (0, count), first)] if count > 0 else []


def _interleaved_qkv(
    prefix: str, parameter: str, shape: tuple[int, ...], model: ModelConfig, at: ShardCoordinates
) -> list[Piece]:
    """Megatron's `[groups, q…q k v, head_dim, hidden]`, per tensor-parallel rank."""
    d, hidden = model.head_dim, model.hidden_size
    groups = model.num_key_value_heads // at.tp_size
    per_group = model.num_attention_heads // model.num_key_value_heads
    view = (groups, per_group + 2, d, hidden)
    first = at.tp_rank * groups

    def piece(name: str, span: tuple[int, int], heads_per_group: int) -> Piece:
        return Piece(
            hf_name=f"{prefix}.{name}.weight",
            start=(first * heads_per_group * d, 0),
            shape=(groups * heads_per_group * d, hidden),
            parameter=parameter,
            view=view,
            index=((0, groups), span, (0, d), (0, hidden)),
        )

    return [
        piece("q_proj", (0, per_group), per_group),
        piece("k_proj", (per_group, per_group + 1), 1),
        piece("v_proj", (per_group + 1, per_group + 2), 1),
    ]


def _gate_up(prefix: str, parameter: str, shape: tuple[int, ...], rank: int) -> list[Piece]:
    inner = shape[0] // 2
    return [
        rows(f"{prefix}.gate_proj.weight", parameter, shape, (0, inner), rank * inner),
        rows(f"{prefix}.up_proj.weight", parameter, shape, (inner, 2 * inner), rank * inner),
    ]


_VLLM_WHOLE = (
    "model.norm.weight",
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
    ".mlp.gate.weight",
)


def vllm_pieces(
    parameter: str, shape: tuple[int, ...], model: ModelConfig, at: ShardCoordinates
) -> list[Piece]:
    """What a vLLM parameter of this rank holds, in the layout of its loader.

    Args:
        parameter: its name in the engine's model.
        shape: its local shape in loader layout (before any kernel's repacking).

    Raises:
        ValueError: for a parameter that this architecture does not have.
    """
    if parameter.endswith(_VLLM_WHOLE):
        return [whole(parameter, parameter, shape)]
    if parameter in ("model.embed_tokens.weight", "lm_head.weight"):
        return _vocabulary_rows(parameter, parameter, shape, model, at)
    prefix, _, last = parameter.removesuffix(".weight").rpartition(".")
    if last == "qkv_proj":
        return _fused_qkv(prefix, parameter, shape, model, at)
    if last == "gate_up_proj":
        return _gate_up(prefix, parameter, shape, at.tp_rank)
    if last in ("o_proj", "down_proj"):
        return [split(parameter, parameter, shape, 1, at.tp_rank)]
    if last in ("w13_weight", "w2_weight"):
        return _stacked_experts(prefix, last, parameter, shape, at)
    raise ValueError(f"unknown vLLM parameter {parameter!r} for {model.model_type}")


def _fused_qkv(
    prefix: str, parameter: str, shape: tuple[int, ...], model: ModelConfig, at: ShardCoordinates
) -> list[Piece]:
    """vLLM's `[Q | K | V]`; where ranks outnumber KV heads, neighbours hold the same head."""
    d = model.head_dim
    q_heads = model.num_attention_heads // at.tp_size
    kv_heads = max(1, model.num_key_value_heads // at.tp_size)
    first_kv = at.tp_rank * model.num_key_value_heads // at.tp_size
    q, kv = q_heads * d, kv_heads * d
    return [
        rows(f"{prefix}.q_proj.weight", parameter, shape, (0, q), at.tp_rank * q),
        rows(f"{prefix}.k_proj.weight", parameter, shape, (q, q + kv), first_kv * d),
        rows(f"{prefix}.v_proj.weight", parameter, shape, (q + kv, q + 2 * kv), first_kv * d),
    ]


def _stacked_experts(
    prefix: str, which: str, parameter: str, shape: tuple[int, ...], at: ShardCoordinates
) -> list[Piece]:
    # The stack is `…experts.routed_experts.w13_weight` in newer vLLM, `…experts.w13_weight` before.
    prefix = prefix.removesuffix(".routed_experts")
    count, first, second = shape
    pieces = []
    for local in range(count):
        expert = f"{prefix}.{at.first_expert + local}"
        if which == "w2_weight":
            pieces.append(
                Piece(
                    f"{expert}.down_proj.weight",
                    (0, at.etp_rank * second),
                    (first, second),
                    parameter,
                    shape,
                    ((local, local + 1), (0, first), (0, second)),
                )
            )
            continue
        inner = first // 2
        for name, begin in (("gate_proj", 0), ("up_proj", inner)):
            pieces.append(
                Piece(
                    f"{expert}.{name}.weight",
                    (at.etp_rank * inner, 0),
                    (inner, second),
                    parameter,
                    shape,
                    ((local, local + 1), (begin, begin + inner), (0, second)),
                )
            )
    return pieces
