"""What a configuration must satisfy before anything is started, all of it checked at once.

Every check is a function from a `RunConfig` to its problems; none of them edits the config, and
none needs torch, an engine or a process group. Limits that are the engines' own say whose.

What the constants of an algorithm must satisfy. This module imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from megatron_precision.checks import layout
from megatron_precision.checks.layout import DATA_PARALLEL_SIZE, value_at
from megatron_precision.config.errors import Problem, UserError, unknown_name
from megatron_precision.config.schema import (
    RECOMPUTE_MODULES,
    TRANSFORMER_ENGINE_FUSIONS,
    RunConfig,
)
from megatron_precision.data.prompts import set_problems
from megatron_precision.precision.policy import DTYPES, is_precision
from megatron_precision.rewards.scorers import SCORERS
from megatron_precision.rl.algorithms import ALGORITHMS


def algorithm_problems(config: RunConfig) -> Iterator[Problem]:
    """Constants of `config.algo` outside of their limits, and what the row cannot work with."""
    algo = config.algo
    agreement = "the weight of a token on which engine and trainer agree is 1, and must stay"
    for name, expected, fits in (
        ("clip_low", "less than 1", algo.clip_low < 1),
        ("sequence_clip_low", "less than 1", algo.sequence_clip_low < 1),
        ("dual_clip", "0, or more than 1", algo.dual_clip == 0 or algo.dual_clip > 1),
        ("correction_threshold", f"1 or more: {agreement}", algo.correction_threshold >= 1),
        ("token_mask_low", f"at most 1: {agreement}", algo.token_mask_low <= 1),
        ("token_mask_high", f"1 or more: {agreement}", algo.token_mask_high >= 1),
        ("overlong_buffer_share", "at most 1", algo.overlong_buffer_share <= 1),
    ):
        if not fits:
            yield Problem("value out of range", f"algo.{name}", str(getattr(algo, name)), expected)
    row = ALGORITHMS.get(algo.name)
    if row and row.dynamic_sampling and config.train.rollouts_per_prompt == 1:
        yield Problem(
            what="dynamic sampling looks for groups whose rewards differ",
            where="train.rollouts_per_prompt",
            got=f"1 with algo.name={algo.name}",
            expected="2 or more",
        )


def settings_problems(config: RunConfig) -> list[Problem]:
    """Everything about a configuration that cannot run, in the order of its sections."""
    found = [*_names(config), *_minimums(config), *_ranges(config)]
    impossible = {problem.where for problem in found}.intersection(_AT_LEAST_ONE)
    return [
        *found,
        *_layout_of_the_rest(config, impossible),
        *_task(config),
        *_sampling(config),
        *algorithm_problems(config),
        *_loss_scale(config),
        *_kernels_and_memory(config),
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
        return text.replace(DATA_PARALLEL_SIZE, "world_size tp_size pp_size")

    return [
        problem for problem in layout.layout_problems(config) if not named.search(sizes(problem))
    ]


def check(config: RunConfig) -> RunConfig:
    """Return the configuration unchanged.

    Raises:
        UserError: lists all of `settings_problems(config)` when there are any.
    """
    found = settings_problems(config)
    if found:
        raise UserError(found)
    return config


def unknown_precision(where: str, got: str) -> Problem:
    """The problem of a precision that names no policy."""
    problem = unknown_name("precision", where, got, DTYPES)
    expected = f"{problem.expected}; or TRAIN/ROLLOUT, such as bf16/fp16"
    return dataclasses.replace(problem, expected=expected)


def unknown_algorithm(where: str, got: str) -> Problem:
    """The problem of an algorithm that has no row; by the papers' names GRPO is PPO here."""
    problem = unknown_name("algorithm", where, got, list(ALGORITHMS))
    ours = got.upper().replace("GRPO", "PPO", 1)
    named = [name for name in ALGORITHMS if name.upper() == ours]
    return dataclasses.replace(problem, remedy=f"it is {named[0]} here") if named else problem


def _names(config: RunConfig) -> Iterator[Problem]:
    if not is_precision(config.precision):
        yield unknown_precision("precision", config.precision)
    if config.algo.name not in ALGORITHMS:
        yield unknown_algorithm("algo.name", config.algo.name)


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
            value = value_at(config, path)
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
        if not 0 <= value_at(config, path) < 1:
            yield Problem("value out of range", path, str(value_at(config, path)), "in [0, 1)")
    factor = config.train.dump_jump_factor
    if factor != 0 and not factor > 1:
        yield Problem(
            "no jump at all", "train.dump_jump_factor", str(factor), "more than 1, or 0 for never"
        )
    for section, low, high in (
        ("warm_start", "target_accuracy_low", "target_accuracy_high"),
        ("perfectible", "accuracy_low", "accuracy_high"),
    ):
        lower, upper = value_at(config, f"{section}.{low}"), value_at(config, f"{section}.{high}")
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
        for name in TRANSFORMER_ENGINE_FUSIONS:
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
