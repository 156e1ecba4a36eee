"""Checks that a configuration divides over its ranks, and that its sizes fit each other.

`checks/settings.py` runs these checks with the others; `plan` runs them alone, on layouts that it
tries. A limit that is an engine's own names the engine.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from megatron_precision.config.errors import Problem
from megatron_precision.config.schema import UNKNOWN_EXPERT, RunConfig
from megatron_precision.layouts.architectures import ARCHITECTURES
from megatron_precision.layouts.vllm import padded_vocab_rows
from megatron_precision.precision.policy import BYTES_PER_ELEMENT, is_precision

# Tokens in one KV cache block of vLLM's CPU build, the largest of the platforms we run on.
KV_BLOCK_TOKENS = 128
DATA_PARALLEL_SIZE = "the data-parallel size"


def layout_problems(config: RunConfig) -> list[Problem]:
    """List every conflict of a layout.

    Args:
        config: all its sizes are 1 or more where they must be.
    """
    return [
        *_trainer_layout(config),
        *_expert_layout(config),
        *_rollout_layout(config),
        *_batches(config),
        *_lengths(config),
    ]


def value_at(config: RunConfig, path: str) -> Any:
    """Return the value of the field that a dotted path names."""
    value: Any = config
    for step in path.split("."):
        value = getattr(value, step)
    return value


def _divides(what: str, where: str, value: int, by: str, divisor: int) -> Iterator[Problem]:
    if value % divisor:
        divisors = [number for number in range(1, value + 1) if value % number == 0]
        yield Problem(
            what=f"{what} does not divide",
            where=f"{where} by {by}",
            got=f"{value} / {divisor}",
            expected=f"a divisor of {value}: {_short(divisors)}",
        )


def _field_divides(config: RunConfig, what: str, path: str, by: str) -> Iterator[Problem]:
    yield from _divides(what, path, value_at(config, path), by, value_at(config, by))


def _short(numbers: list[int]) -> str:
    text = [str(number) for number in numbers]
    return ", ".join(text if len(text) <= 10 else [*text[:9], "…", text[-1]])


def _trainer_layout(config: RunConfig) -> Iterator[Problem]:
    # Two sizes are not here because they always fit: the hidden size is never split by tensor
    # parallelism, and Megatron pads the vocabulary to a multiple of TP.
    layout, model = config.parallel, config.model
    grid = layout.tp_size * layout.pp_size
    yield from _divides(
        "the world", "parallel.world_size", layout.world_size, "tp_size * pp_size", grid
    )
    heads = "model.num_attention_heads"
    yield from _field_divides(config, "the number of attention heads", heads, "parallel.tp_size")
    yield from _field_divides(
        config, "the number of attention heads", heads, "model.num_key_value_heads"
    )
    # Megatron could share one KV head between TP ranks; the weight sync sends whole groups.
    yield from _field_divides(
        config, "the number of KV heads", "model.num_key_value_heads", "parallel.tp_size"
    )
    if not model.num_experts:
        yield from _field_divides(config, "the MLP", "model.intermediate_size", "parallel.tp_size")
    layers = "model.num_hidden_layers"
    for problem in _field_divides(config, "the number of layers", layers, "parallel.pp_size"):
        # The message names the numbers of stages that divide the layers.
        yield dataclasses.replace(problem, remedy="stages of unequal depth are not supported")
    if model.head_dim % 2:
        yield Problem(
            "rotary embeddings need pairs", "model.head_dim", str(model.head_dim), "an even number"
        )
    queries = model.num_attention_heads
    if model.model_type == "qwen2" and queries * model.head_dim != model.hidden_size:
        yield Problem(
            what="vLLM takes the width of a Qwen2 head from the hidden size",
            where="model.head_dim",
            got=f"{model.head_dim} with {queries} heads of a hidden size of {model.hidden_size}",
            expected="model.hidden_size / model.num_attention_heads",
        )
    if layout.sequence_parallel and layout.tp_size == 1:
        yield Problem(
            what="sequence parallelism without tensor parallelism",
            where="parallel.sequence_parallel",
            got="true with parallel.tp_size=1",
            expected="false, or tp_size above 1 (Megatron Core refuses it)",
        )


def _expert_layout(config: RunConfig) -> Iterator[Problem]:
    layout, model = config.parallel, config.model
    if ARCHITECTURES[model.model_type].experts != (model.num_experts > 0):
        yield Problem(
            what="the architecture and the number of experts disagree",
            where="model.model_type, model.num_experts",
            got=f"{model.model_type} with {model.num_experts} experts",
            expected="qwen3_moe with experts, or a dense architecture with none",
        )
    elif model.num_experts:
        yield from _experts(config)
    else:
        if config.train.routing_replay:
            yield Problem("a dense model has no routing", "train.routing_replay", "true", "false")
        for name in ("ep_size", "etp_size"):
            if getattr(layout, name) != 1:
                yield Problem(
                    what="expert parallelism without experts",
                    where=f"parallel.{name}",
                    got=str(getattr(layout, name)),
                    expected="1 for a dense model",
                )


def _experts(config: RunConfig) -> Iterator[Problem]:
    layout, model = config.parallel, config.model
    grid = layout.etp_size * layout.ep_size * layout.pp_size
    yield from _divides(
        "the world", "parallel.world_size", layout.world_size, "etp_size * ep_size * pp_size", grid
    )
    yield from _field_divides(
        config, "the number of experts", "model.num_experts", "parallel.ep_size"
    )
    yield from _field_divides(
        config, "the experts' MLP", "model.moe_intermediate_size", "parallel.etp_size"
    )
    if model.moe_intermediate_size < 1:
        yield Problem(
            "an expert without a width",
            "model.moe_intermediate_size",
            str(model.moe_intermediate_size),
            "1 or more for an MoE model",
        )
    if not 1 <= model.num_experts_per_tok <= model.num_experts:
        yield Problem(
            "a token cannot be sent to that many experts",
            "model.num_experts_per_tok",
            str(model.num_experts_per_tok),
            f"1 to {model.num_experts}",
        )
    if layout.ep_size == 1 and layout.etp_size != layout.tp_size:
        # Megatron Core 0.16.1 counts experts as dense parameters then: their gradients are reduced
        # over the dense data parallelism (docs/upstream/megatron_expert_gradients.md).
        yield Problem(
            what="the experts' gradients would be summed over other ranks than hold them",
            where="parallel.etp_size",
            got=f"{layout.etp_size} with parallel.tp_size={layout.tp_size} and ep_size=1",
            expected="parallel.etp_size equal to tp_size, or parallel.ep_size above 1",
        )
    if config.rollout.record_routing and model.num_experts >= UNKNOWN_EXPERT:
        yield Problem(
            what="more experts than a recorded choice can name",
            where="model.num_experts",
            got=str(model.num_experts),
            expected=f"at most {UNKNOWN_EXPERT - 1}",
            remedy="--set rollout.record_routing=false",
        )
    if config.train.routing_replay and not config.rollout.record_routing:
        yield Problem(
            what="no recorded routing to replay",
            where="train.routing_replay",
            got="true with rollout.record_routing=false",
            expected="rollout.record_routing=true",
        )
    if layout.tp_size > 1 and not layout.sequence_parallel:
        yield Problem(
            what="MoE with tensor parallelism but without sequence parallelism",
            where="parallel.sequence_parallel",
            got=f"false with parallel.tp_size={layout.tp_size}",
            expected="true (Megatron Core's MoE layer refuses to train without it)",
            remedy="--set parallel.sequence_parallel=true, or parallel.tp_size=1",
        )


def _rollout_layout(config: RunConfig) -> Iterator[Problem]:
    model, by = config.model, "parallel.rollout_tp_size"
    mlp = "moe_intermediate_size" if model.num_experts else "intermediate_size"
    yield from _field_divides(config, "the world", "parallel.world_size", by)
    yield from _field_divides(
        config, "the number of attention heads", "model.num_attention_heads", by
    )
    yield from _field_divides(config, "the MLP", f"model.{mlp}", by)
    # vLLM pads to a multiple of 64 whatever the size, and then asserts that it divides.
    rows, size = padded_vocab_rows(model), config.parallel.rollout_tp_size
    if rows % size:
        yield Problem(
            what="the padded vocabulary does not divide",
            where=f"model.vocab_size by {by}",
            got=f"{rows} / {size} ({model.vocab_size} rows, padded by vLLM to a multiple of 64)",
            expected=f"a divisor of {rows}",
        )
    heads = model.num_key_value_heads
    if heads % size and size % heads:
        yield Problem(
            what="the number of KV heads does not divide",
            where=f"model.num_key_value_heads by {by}",
            got=f"{heads} / {size}",
            expected="one a multiple of the other (vLLM repeats KV heads when TP exceeds them)",
        )


def _batches(config: RunConfig) -> Iterator[Problem]:
    train, dp_size = config.train, config.parallel.dp_size
    yield from _field_divides(
        config, "an iteration", "train.prompts_per_iteration", "train.prompts_per_mini_batch"
    )
    if dp_size < 1:
        return  # the world is too small for its layout, which is reported already
    # Every rank then has the same number of sequences, hence of micro-batches: with expert
    # parallelism over data-parallel ranks an odd one out would wait in an all-to-all for ever.
    batches = [
        (
            "a mini-batch",
            "train.prompts_per_mini_batch * train.rollouts_per_prompt",
            train.prompts_per_mini_batch * train.rollouts_per_prompt,
        )
    ]
    if config.start.kind == "warm_start":
        batches.append(
            ("a warm-start batch", "warm_start.batch_size", config.warm_start.batch_size)
        )
    for what, where, sequences in batches:
        yield from _divides(what, where, sequences, DATA_PARALLEL_SIZE, dp_size)


def _lengths(config: RunConfig) -> Iterator[Problem]:
    model, rollout = config.model, config.rollout
    longest = config.max_sequence_tokens
    if longest > model.max_position_embeddings:
        yield Problem(
            what="prompt and response are longer than the model's positions",
            where="task.max_prompt_tokens + rollout.max_response_tokens",
            got=str(longest),
            expected=f"at most model.max_position_embeddings={model.max_position_embeddings}",
        )
    if rollout.max_num_batched_tokens < rollout.max_num_seqs:
        yield Problem(
            what="a decoding step cannot hold its sequences",
            where="rollout.max_num_batched_tokens",
            got=str(rollout.max_num_batched_tokens),
            expected=f"at least rollout.max_num_seqs={rollout.max_num_seqs} (vLLM refuses less)",
        )
    if not is_precision(config.precision):
        return
    budget, multiple = config.train.micro_batch_tokens, config.width_multiple
    width = math.ceil(longest / multiple) * multiple
    if 0 < budget < width:
        yield Problem(
            what="the budget of a micro-batch cannot hold one sequence",
            where="train.micro_batch_tokens",
            got=str(budget),
            expected=f"at least {width} for {longest} tokens of prompt and response; 0 for none",
        )
    # One sequence in whole blocks, and the block that vLLM keeps empty.
    blocks = math.ceil(longest / KV_BLOCK_TOKENS) + 1
    needed_mib = math.ceil(blocks * KV_BLOCK_TOKENS * kv_token_bytes(config) / 2**20)
    if rollout.kv_cache_mib < needed_mib:
        yield Problem(
            what="the KV cache cannot hold one sequence",
            where="rollout.kv_cache_mib",
            got=f"{rollout.kv_cache_mib} MiB a rank",
            expected=f"at least {needed_mib} MiB for {longest} tokens",
        )


def kv_token_bytes(config: RunConfig) -> int:
    """Return the bytes of one token's KV cache on one rank, over all layers."""
    model = config.model
    heads = max(1, model.num_key_value_heads // config.parallel.rollout_tp_size)
    return (
        2
        * model.num_hidden_layers
        * heads
        * model.head_dim
        * BYTES_PER_ELEMENT[config.policy.kv_cache]
    )
