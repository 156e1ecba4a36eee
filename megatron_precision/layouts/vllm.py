"""vLLM: what each parameter of an engine's rank holds, as boxes of Hugging Face tensors.

In the layout of vLLM's loader, before any kernel's repacking:
    qkv_proj       `[Q | K | V]` of the rank's heads; KV heads repeat where ranks outnumber them.
    gate_up_proj   `[gate | up]` of the rank's part.
    experts        stacked `w13 [E, 2I, H]` and `w2 [E, H, I]`.
    vocabulary     padded rows belong to no Hugging Face tensor.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_precision.config.schema import ModelConfig
from megatron_precision.layouts.architectures import architecture
from megatron_precision.layouts.megatron import ShardCoordinates, gate_up, vocabulary_rows
from megatron_precision.layouts.regions import Region, round_up, rows, split, whole

# vLLM pads the vocabulary to a multiple of this (`DEFAULT_VOCAB_PADDING_SIZE`).
VOCAB_MULTIPLE = 64
_VLLM_WHOLE = (
    "model.norm.weight",
    ".input_layernorm.weight",
    ".post_attention_layernorm.weight",
    ".q_norm.weight",
    ".k_norm.weight",
    ".mlp.gate.weight",
)


def padded_vocab_rows(model: ModelConfig) -> int:
    """Round the vocabulary up to the rows of vLLM's embedding, which its ranks divide."""
    return round_up(model.vocab_size, VOCAB_MULTIPLE)


def vllm_parameters(
    model: ModelConfig, tp_size: int = 1, etp_size: int = 1
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """List names and shapes of an engine rank's parameters, in the loader's layout.

    All experts are listed; a rank of an expert-parallel engine has some of them.

    Args:
        etp_size: ranks that divide an expert; 1 where experts are divided over the ranks whole.
    """
    hidden, d, has = model.hidden_size, model.head_dim, architecture(model)
    q = model.num_attention_heads * d // tp_size
    kv = max(1, model.num_key_value_heads // tp_size) * d
    vocab_rows = padded_vocab_rows(model) // tp_size
    yield "model.embed_tokens.weight", (vocab_rows, hidden)
    for i in range(model.num_hidden_layers):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.self_attn.qkv_proj.weight", (q + 2 * kv, hidden)
        if has.qkv_bias:
            yield f"{layer}.self_attn.qkv_proj.bias", (q + 2 * kv,)
        if has.qk_norm:
            yield f"{layer}.self_attn.q_norm.weight", (d,)
            yield f"{layer}.self_attn.k_norm.weight", (d,)
        yield f"{layer}.self_attn.o_proj.weight", (hidden, q)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        if not has.experts:
            inner = model.intermediate_size // tp_size
            yield f"{layer}.mlp.gate_up_proj.weight", (2 * inner, hidden)
            yield f"{layer}.mlp.down_proj.weight", (hidden, inner)
            continue
        experts, inner = model.num_experts, model.moe_intermediate_size // etp_size
        yield f"{layer}.mlp.gate.weight", (model.num_experts, hidden)
        stack = f"{layer}.mlp.experts.routed_experts"
        yield f"{stack}.w13_weight", (experts, 2 * inner, hidden)
        yield f"{stack}.w2_weight", (experts, hidden, inner)
    yield "model.norm.weight", (hidden,)
    if not model.tie_word_embeddings:
        yield "lm_head.weight", (vocab_rows, hidden)


def vllm_regions(
    parameter: str, shape: tuple[int, ...], model: ModelConfig, at: ShardCoordinates
) -> list[Region]:
    """List the regions of a vLLM parameter on this rank, in the loader's layout.

    Args:
        parameter: its name in the engine's model.
        shape: its local shape in loader layout (before any kernel's repacking).

    Raises:
        ValueError: for a parameter that this architecture does not have.
    """
    if parameter.endswith(_VLLM_WHOLE):
        return [whole(parameter, parameter, shape)]
    if parameter in ("model.embed_tokens.weight", "lm_head.weight"):
        return vocabulary_rows(parameter, parameter, shape, model, at)
    biased = architecture(model).qkv_bias and parameter.endswith(".qkv_proj.bias")
    name = parameter.removesuffix(".bias" if biased else ".weight")
    prefix, _, last = name.rpartition(".")
    if last == "qkv_proj":
        return _fused_qkv(prefix, parameter, shape, model, at)
    if last == "gate_up_proj":
        return gate_up(prefix, parameter, shape, at.tp_rank)
    if last in ("o_proj", "down_proj"):
        return [split(parameter, parameter, shape, 1, at.tp_rank)]
    if last in ("w13_weight", "w2_weight"):
        return _stacked_experts(prefix, last, parameter, shape, at)
    raise ValueError(f"unknown vLLM parameter {parameter!r} for {model.model_type}")


def _fused_qkv(
    prefix: str, parameter: str, shape: tuple[int, ...], model: ModelConfig, at: ShardCoordinates
) -> list[Region]:
    """List the regions of `[Q | K | V]`; if ranks outnumber KV heads, neighbours share one."""
    d, kind = model.head_dim, parameter.rpartition(".")[2]
    q_heads = model.num_attention_heads // at.tp_size
    kv_heads = max(1, model.num_key_value_heads // at.tp_size)
    first_kv = at.tp_rank * model.num_key_value_heads // at.tp_size
    q, kv = q_heads * d, kv_heads * d
    return [
        rows(f"{prefix}.q_proj.{kind}", parameter, shape, (0, q), at.tp_rank * q),
        rows(f"{prefix}.k_proj.{kind}", parameter, shape, (q, q + kv), first_kv * d),
        rows(f"{prefix}.v_proj.{kind}", parameter, shape, (q + kv, q + 2 * kv), first_kv * d),
    ]


def _stacked_experts(
    prefix: str, which: str, parameter: str, shape: tuple[int, ...], at: ShardCoordinates
) -> list[Region]:
    # The stack is `…experts.routed_experts.w13_weight` in newer vLLM, `…experts.w13_weight` before.
    prefix = prefix.removesuffix(".routed_experts")
    count, first, second = shape
    regions = []
    for local in range(count):
        expert = f"{prefix}.{at.first_expert + local}"
        if which == "w2_weight":
            regions.append(
                Region(
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
            regions.append(
                Region(
                    f"{expert}.{name}.weight",
                    (at.etp_rank * inner, 0),
                    (inner, second),
                    parameter,
                    shape,
                    ((local, local + 1), (begin, begin + inner), (0, second)),
                )
            )
    return regions
