"""What a configuration must satisfy before anything is started, all of it checked at once.

Every check is a function from a `RunConfig` to its problems; none of them edits the config, and
none needs torch, an engine or a process group. Limits that are the engines' own say whose.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from megatron_precision.config import RECOMPUTE_MODULES, UNKNOWN_EXPERT, RunConfig
from megatron_precision.data.sets import set_problems
from megatron_precision.errors import Problem, UserError, unknown_name
from megatron_precision.precision.policy import DTYPES, policy
from megatron_precision.rewards.scorers import SCORERS
from megatron_precision.rl import limits
from megatron_precision.rl.algorithms import ALGORITHMS
from megatron_precision.weights.architectures import ARCHITECTURES
from megatron_precision.weights.vllm_layout import padded_vocab_rows

# Tokens in one KV cache block of vLLM's CPU build, the largest of the platforms we run on.
KV_BLOCK_TOKENS = 128
BYTES_PER_ELEMENT = {"fp16": 2, "bf16": 2, "fp32": 4}


def problems(config: RunConfig) -> list[Problem]:
    """Everything about a configuration that cannot run, in the order of its sections."""
    found = [*_names(config), *_minimums(config), *_ranges(config)]
    impossible = {problem.where for problem in found}.intersection(_AT_LEAST_ONE)
    return [
        *found,
        *_layout_of_the_rest(config, impossible),
        *_task(config),
        *_sampling(config),
        *limits.problems(config),
        *_loss_scale(config),
        *_kernels_and_memory(config),
    ]


def layout_problems(config: RunConfig) -> list[Problem]:
    """What of a configuration does not divide, or does not go together, over its ranks.

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


def _layout_of_the_rest(config: RunConfig, impossible: set[str]) -> list[Problem]:
    """Layout problems that have nothing to do with a size of zero or less.

    Such a size is taken as 1, and what then is said of it is left out.
    """
    for path in impossible:
        section, name = path.split(".")
        mended: Any = {name: 1}
        part = dataclasses.replace(getattr(config, section), **mended)
        config = dataclasses.replace(config, **{section: part})
    names = "|".join(path.rpartition(".")[2] for path in impossible)
    named = re.compile(rf"\b({names})\b" if names else r"(?!)")

    def sizes(problem: Problem) -> str:
        text = f"{problem.where} {problem.expected}"
        return text.replace(_DATA_PARALLEL_SIZE, "world_size tp_size pp_size")

    return [problem for problem in layout_problems(config) if not named.search(sizes(problem))]


_DATA_PARALLEL_SIZE = "the data-parallel size"


def check(config: RunConfig) -> RunConfig:
    """Return the configuration unchanged.

    Raises:
        UserError: lists all of `problems(config)` when there are any.
    """
    found = problems(config)
    if found:
        raise UserError(found)
    return config


def is_precision(name: str) -> bool:
    """Whether a precision policy goes by this name."""
    try:
        policy(name)
    except ValueError:
        return False
    return True


def unknown_precision(where: str, got: str) -> Problem:
    """The problem of a precision that names no policy."""
    problem = unknown_name("precision", where, got, DTYPES)
    expected = f"{problem.expected}; or TRAIN/ROLLOUT, such as bf16/fp16"
    return dataclasses.replace(problem, expected=expected)


def _value(config: RunConfig, path: str) -> Any:
    value: Any = config
    for step in path.split("."):
        value = getattr(value, step)
    return value


def _names(config: RunConfig) -> Iterator[Problem]:
    if not is_precision(config.precision):
        yield unknown_precision("precision", config.precision)
    if config.algo.name not in ALGORITHMS:
        yield unknown_name("algorithm", "algo.name", config.algo.name, list(ALGORITHMS))


_AT_LEAST_ONE = (
    "parallel.world_size", "parallel.tp_size", "parallel.pp_size", "parallel.ep_size",
    "parallel.etp_size", "parallel.rollout_tp_size",
    "model.vocab_size", "model.hidden_size", "model.intermediate_size",
    "model.num_hidden_layers", "model.num_attention_heads", "model.num_key_value_heads",
    "model.head_dim", "model.max_position_embeddings",
    "task.difficulty", "task.train_questions", "task.max_prompt_tokens", "task.scorer_workers",
    "warm_start.batch_size", "warm_start.micro_batch_size", "warm_start.check_every",
    "warm_start.check_questions", "warm_start.check_samples",
    "perfectible.samples_per_question",
    "rollout.max_response_tokens", "rollout.max_num_seqs", "rollout.max_num_batched_tokens",
    "rollout.kv_cache_mib", "sync.batch_mib",
    "loss_scale.growth_interval", "loss_scale.hysteresis", "loss_scale.hopeless_overflows",
    "checkpoint.keep",
    "train.prompts_per_iteration", "train.rollouts_per_prompt", "train.prompts_per_mini_batch",
    "train.micro_batch_size", "eval.samples_per_question",
)  # fmt: skip
_AT_LEAST_ZERO = (
    "seed", "model.num_experts", "model.num_experts_per_tok", "model.moe_intermediate_size",
    "task.eval_questions", "warm_start.max_steps", "warm_start.warmup_steps",
    "optimizer.warmup_steps", "optimizer.weight_decay", "optimizer.clip_grad",
    "loss_scale.headroom_bits", "train.iterations", "train.micro_batch_tokens",
    "train.mismatch_every", "train.dump_every", "train.dump_jumps_at_most",
    "train.dump_weights_gib", "eval.every", "eval.temperature", "algo.overlong_penalty",
    "algo.dynamic_sampling_rounds", "checkpoint.every",
    "watchdog.start_s", "watchdog.rollout_s", "watchdog.old_logprobs_s", "watchdog.train_s",
    "watchdog.sync_s", "watchdog.evaluation_s", "watchdog.checkpoint_s", "watchdog.other_s",
)  # fmt: skip
_ABOVE_ZERO = (
    "model.rope_theta", "model.rope_scaling_factor", "model.rms_norm_eps",
    "model.initializer_range",
    "warm_start.learning_rate", "task.scorer_time_limit_s", "eval.top_p",
    "optimizer.learning_rate", "optimizer.eps", "rollout.temperature",
    "algo.clip_low", "algo.clip_high", "algo.sequence_clip_low", "algo.sequence_clip_high",
    "algo.token_mask_low", "algo.log_weight_clamp", "algo.overlong_buffer_share",
)  # fmt: skip
_SHARES = (
    "warm_start.target_accuracy_low", "warm_start.target_accuracy_high",
    "perfectible.accuracy_low", "perfectible.accuracy_high", "eval.top_p",
    "memory.optimizer_offload",
)  # fmt: skip


def _minimums(config: RunConfig) -> Iterator[Problem]:
    for paths, expected in (
        (_AT_LEAST_ONE, "1 or more"),
        (_AT_LEAST_ZERO, "0 or more"),
        (_ABOVE_ZERO, "more than 0"),
        (_SHARES, "between 0 and 1"),
    ):
        for path in paths:
            value = _value(config, path)
            fits = {
                "1 or more": value >= 1,
                "0 or more": value >= 0,
                "more than 0": value > 0,
                "between 0 and 1": 0 <= value <= 1,
            }[expected]
            if not fits:
                yield Problem("value out of range", path, str(value), expected)


def _ranges(config: RunConfig) -> Iterator[Problem]:
    for path in ("optimizer.beta1", "optimizer.beta2"):
        if not 0 <= _value(config, path) < 1:
            yield Problem("value out of range", path, str(_value(config, path)), "in [0, 1)")
    factor = config.train.dump_jump_factor
    if factor != 0 and not factor > 1:
        yield Problem(
            "no jump at all", "train.dump_jump_factor", str(factor), "more than 1, or 0 for never"
        )
    for section, low, high in (
        ("warm_start", "target_accuracy_low", "target_accuracy_high"),
        ("perfectible", "accuracy_low", "accuracy_high"),
    ):
        lower, upper = _value(config, f"{section}.{low}"), _value(config, f"{section}.{high}")
        if lower >= upper:
            yield Problem(
                "the bounds hold nothing between them",
                f"{section}.{low}, {section}.{high}",
                f"{lower} and {upper}",
                "the first below the second",
            )


_SCORER = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def _task(config: RunConfig) -> Iterator[Problem]:
    task = config.task
    starts = {"arithmetic": "warm_start", "chat": "checkpoint"}
    if config.start.kind != starts[task.name]:
        yield Problem(
            what="the task and the start do not fit",
            where="task.name, start.kind",
            got=f"{task.name} from a {config.start.kind}",
            expected=f"start.kind={starts[task.name]} (it has the tokenizer of the task)",
        )
    yield from set_problems("task.train_sets", task.train_sets)
    yield from set_problems("task.eval_sets", task.eval_sets)
    if task.scorer not in SCORERS and not _SCORER.fullmatch(task.scorer):
        problem = unknown_name("scorer", "task.scorer", task.scorer, list(SCORERS))
        expected = f"{problem.expected}; or MODULE:FUNCTION of your own"
        yield dataclasses.replace(problem, expected=expected)


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
    yield from _divides(what, path, _value(config, path), by, _value(config, by))


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
    if layout.cp_size != 1:
        yield Problem(
            what="context parallelism is not supported",
            where="parallel.cp_size",
            got=str(layout.cp_size),
            expected="1",
            remedy=(
                "divide long sequences by parallel.tp_size with parallel.sequence_parallel=true, "
                "and set memory.recompute=full memory.attention=fused"
            ),
        )
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
        yield from _divides(what, where, sequences, _DATA_PARALLEL_SIZE, dp_size)


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
    heads = max(1, model.num_key_value_heads // config.parallel.rollout_tp_size)
    element_bytes = BYTES_PER_ELEMENT[config.policy.kv_cache]
    token_bytes = 2 * model.num_hidden_layers * heads * model.head_dim * element_bytes
    # One sequence in whole blocks, and the block that vLLM keeps empty.
    blocks = math.ceil(longest / KV_BLOCK_TOKENS) + 1
    needed_mib = math.ceil(blocks * KV_BLOCK_TOKENS * token_bytes / 2**20)
    if rollout.kv_cache_mib < needed_mib:
        yield Problem(
            what="the KV cache cannot hold one sequence",
            where="rollout.kv_cache_mib",
            got=f"{rollout.kv_cache_mib} MiB a rank",
            expected=f"at least {needed_mib} MiB for {longest} tokens",
        )


def _sampling(config: RunConfig) -> Iterator[Problem]:
    # The trainer differentiates the model's own distribution at the rollout temperature. These
    # settings make vLLM sample from, and report log-probs of, another one.
    reason = "the engine's log-probs would be renormalised, and the mismatch falsified"
    rollout = config.rollout
    for name, neutral in (("top_p", 1.0), ("top_k", -1), ("repetition_penalty", 1.0)):
        if getattr(rollout, name) != neutral:
            yield Problem(
                what=f"{name} is not allowed in training rollouts",
                where=f"rollout.{name}",
                got=str(getattr(rollout, name)),
                expected=f"{neutral}: {reason}",
            )


def _loss_scale(config: RunConfig) -> Iterator[Problem]:
    scale = config.loss_scale
    for name in ("initial_scale", "min_scale"):
        value = getattr(scale, name)
        if value <= 0 or math.frexp(value)[0] != 0.5:
            yield Problem(
                what="a loss scale that is not a power of two would round the gradients",
                where=f"loss_scale.{name}",
                got=str(value),
                expected="a power of two, such as 2**16",
            )
    if scale.initial_scale < scale.min_scale:
        yield Problem(
            "the loss scale starts below its minimum",
            "loss_scale.initial_scale",
            str(scale.initial_scale),
            f"at least loss_scale.min_scale={scale.min_scale}",
        )


def _kernels_and_memory(config: RunConfig) -> Iterator[Problem]:
    memory, kernels = config.memory, config.kernels
    for name in memory.recompute_modules:
        if name not in RECOMPUTE_MODULES:
            yield unknown_name(
                "part of a layer", "memory.recompute_modules", name, RECOMPUTE_MODULES
            )
        elif name in ("moe", "moe_act") and not config.model.num_experts:
            yield Problem(
                "a dense model has no experts", "memory.recompute_modules", name, "other parts"
            )
    if memory.recompute == "selective" and not memory.recompute_modules:
        yield Problem(
            "nothing to recompute", "memory.recompute_modules", "none", "one part or more"
        )
    if kernels.trainer == "local":
        for name in ("fused_rope", "fused_permute"):
            if getattr(kernels, name):
                yield Problem(
                    what="a kernel of Transformer Engine without Transformer Engine",
                    where=f"kernels.{name}",
                    got="true with kernels.trainer=local",
                    expected="false, or kernels.trainer=transformer_engine",
                )
    if kernels.cuda_graphs and config.records_routing:
        yield Problem(
            what="a replayed engine shows nothing of its routing",
            where="kernels.cuda_graphs, rollout.record_routing",
            got="both",
            expected="one of them",
        )
    if memory.offload_trainer and is_precision(config.precision) and config.policy.params == "fp32":
        yield Problem(
            what="FP32 parameters are their own main copies and cannot step aside",
            where="memory.offload_trainer",
            got=f"true with the precision {config.precision}",
            expected="false, or a 16-bit trainer",
        )
