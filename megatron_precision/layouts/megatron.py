"""Megatron Core: what each parameter of a rank holds, as boxes of Hugging Face tensors.

Read by the actor (loading), by the weight sync (the sending end) and by the checkpoint converter.

Layouts that are not one-to-one:
    linear_qkv   per KV group `[q … q | k | v]`, weights and biases; Hugging Face has three tensors.
    linear_fc1   `[gate | up]` inside each tensor-parallel rank.
    vocabulary   padded rows belong to no Hugging Face tensor.

Names of both layer specs are known: the local one's (`input_layernorm`, one module an expert) and
Transformer Engine's (`linear_qkv.layer_norm_weight`, `experts.linear_fc1.weight3`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_precision.config.schema import ModelConfig
from megatron_precision.layouts.architectures import architecture
from megatron_precision.layouts.regions import Region, round_up, rows, split, whole


@dataclass(frozen=True)
class ShardCoordinates:
    """A rank's coordinates in its side's layout.

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


# The vocabulary is padded so that every tensor-parallel rank holds the same, even number of rows.
VOCAB_MULTIPLE = 8
_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_LOCAL_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.weight")
_GROUPED_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)")
_MEGATRON_WHOLE = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
    "mlp.router.weight": "mlp.gate.weight",
}


def megatron_regions(
    parameter: str, shape: tuple[int, ...], model: ModelConfig, at: ShardCoordinates
) -> list[Region]:
    """List the regions of a Megatron parameter on this rank.

    Args:
        parameter: its name in `GPTModel.named_parameters()`.
        shape: its local shape.

    Raises:
        ValueError: for a parameter that this architecture does not have.
    """
    if parameter == "embedding.word_embeddings.weight":
        return vocabulary_rows("model.embed_tokens.weight", parameter, shape, model, at)
    if parameter == "output_layer.weight":
        # With tied embeddings the last pipeline stage holds a copy of the first stage's.
        tied = model.tie_word_embeddings
        hf_name = "model.embed_tokens.weight" if tied else "lm_head.weight"
        return vocabulary_rows(hf_name, parameter, shape, model, at)
    if parameter == "decoder.final_layernorm.weight":
        return [whole("model.norm.weight", parameter, shape)]
    match = _LAYER.fullmatch(parameter)
    if match is None:
        raise ValueError(f"unknown Megatron parameter {parameter!r} for {model.model_type}")
    layer, rest = f"model.layers.{int(match[1]) + at.first_layer}", match[2]
    if rest in _MEGATRON_WHOLE:
        return [whole(f"{layer}.{_MEGATRON_WHOLE[rest]}", parameter, shape)]
    biased = architecture(model).qkv_bias and rest == "self_attention.linear_qkv.bias"
    if biased or rest == "self_attention.linear_qkv.weight":
        return _interleaved_qkv(f"{layer}.self_attn", parameter, shape, model, at)
    if rest == "self_attention.linear_proj.weight":
        return [split(f"{layer}.self_attn.o_proj.weight", parameter, shape, 1, at.tp_rank)]
    if rest == "mlp.linear_fc1.weight":
        return gate_up(f"{layer}.mlp", parameter, shape, at.tp_rank)
    if rest == "mlp.linear_fc2.weight":
        return [split(f"{layer}.mlp.down_proj.weight", parameter, shape, 1, at.tp_rank)]
    if expert := _local_expert(rest):
        number, linear = expert
        prefix = f"{layer}.mlp.experts.{number + at.first_expert}"
        if linear == "linear_fc1":
            return gate_up(prefix, parameter, shape, at.etp_rank)
        return [split(f"{prefix}.down_proj.weight", parameter, shape, 1, at.etp_rank)]
    raise ValueError(f"unknown Megatron parameter {parameter!r} for {model.model_type}")


def megatron_parameters(
    model: ModelConfig, vocab_rows: int, tp_size: int = 1, etp_size: int = 1
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """List names and shapes of a tensor-parallel rank's GPTModel, by Transformer Engine's spec.

    All layers and experts are listed; a rank of a pipeline stage, or of an expert-parallel group,
    has some of them.

    Args:
        vocab_rows: the rank's, padding included.
    """
    hidden, d, has = model.hidden_size, model.head_dim, architecture(model)
    q = model.num_attention_heads * d // tp_size
    kv = model.num_key_value_heads * d // tp_size
    yield "embedding.word_embeddings.weight", (vocab_rows, hidden)
    for i in range(model.num_hidden_layers):
        attention, mlp = f"decoder.layers.{i}.self_attention", f"decoder.layers.{i}.mlp"
        yield f"{attention}.linear_qkv.layer_norm_weight", (hidden,)
        yield f"{attention}.linear_qkv.weight", (q + 2 * kv, hidden)
        if has.qkv_bias:
            yield f"{attention}.linear_qkv.bias", (q + 2 * kv,)
        if has.qk_norm:
            yield f"{attention}.q_layernorm.weight", (d,)
            yield f"{attention}.k_layernorm.weight", (d,)
        yield f"{attention}.linear_proj.weight", (hidden, q)
        if not has.experts:
            inner = model.intermediate_size // tp_size
            yield f"{mlp}.linear_fc1.layer_norm_weight", (hidden,)
            yield f"{mlp}.linear_fc1.weight", (2 * inner, hidden)
            yield f"{mlp}.linear_fc2.weight", (hidden, inner)
            continue
        yield f"decoder.layers.{i}.pre_mlp_layernorm.weight", (hidden,)
        yield f"{mlp}.router.weight", (model.num_experts, hidden)
        for e in range(model.num_experts):
            inner = model.moe_intermediate_size // etp_size
            yield f"{mlp}.experts.linear_fc1.weight{e}", (2 * inner, hidden)
            yield f"{mlp}.experts.linear_fc2.weight{e}", (hidden, inner)
    yield "decoder.final_layernorm.weight", (hidden,)
    if not model.tie_word_embeddings:
        yield "output_layer.weight", (vocab_rows, hidden)


def padded_vocab_size(vocab_size: int, tp_size: int) -> int:
    """Round the vocabulary up to the rows of Megatron's embedding, a multiple of 8 × TP."""
    return round_up(vocab_size, VOCAB_MULTIPLE * tp_size)


def vocabulary_rows(
    hf_name: str, parameter: str, shape: tuple[int, ...], model: ModelConfig, at: ShardCoordinates
) -> list[Region]:
    """Return the region of real vocabulary rows; a rank of padding alone has none."""
    first = at.tp_rank * shape[0]
    count = min(shape[0], model.vocab_size - first)
    return [rows(hf_name, parameter, shape, (0, count), first)] if count > 0 else []


def _local_expert(name: str) -> tuple[int, str] | None:
    """Return (local expert, linear layer) of an expert's parameter, in either naming."""
    if local := _LOCAL_EXPERT.fullmatch(name):
        return int(local[1]), local[2]
    if grouped := _GROUPED_EXPERT.fullmatch(name):
        return int(grouped[2]), grouped[1]
    return None


def _interleaved_qkv(
    prefix: str, parameter: str, shape: tuple[int, ...], model: ModelConfig, at: ShardCoordinates
) -> list[Region]:
    """List the regions of Megatron's `[groups, q…q k v, head_dim(, hidden)]` on a TP rank."""
    d, kind = model.head_dim, parameter.rpartition(".")[2]
    groups = model.num_key_value_heads // at.tp_size
    per_group = model.num_attention_heads // model.num_key_value_heads
    inner = shape[1:]  # hidden of the weight; a bias has none
    first = at.tp_rank * groups

    def region(name: str, span: tuple[int, int], heads_per_group: int) -> Region:
        return Region(
            hf_name=f"{prefix}.{name}.{kind}",
            start=(first * heads_per_group * d, *(0 for _ in inner)),
            shape=(groups * heads_per_group * d, *inner),
            parameter=parameter,
            view=(groups, per_group + 2, d, *inner),
            index=((0, groups), span, (0, d), *((0, n) for n in inner)),
        )

    return [
        region("q_proj", (0, per_group), per_group),
        region("k_proj", (per_group, per_group + 1), 1),
        region("v_proj", (per_group + 1, per_group + 2), 1),
    ]


def gate_up(prefix: str, parameter: str, shape: tuple[int, ...], rank: int) -> list[Region]:
    """List the regions of `[gate | up]` on a TP rank; the same in Megatron and in vLLM."""
    inner = shape[0] // 2
    return [
        rows(f"{prefix}.gate_proj.weight", parameter, shape, (0, inner), rank * inner),
        rows(f"{prefix}.up_proj.weight", parameter, shape, (inner, 2 * inner), rank * inner),
    ]
