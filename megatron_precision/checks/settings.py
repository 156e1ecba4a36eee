"""Checks a configuration before anything starts, and reports all of its problems at once.

Every check is a function from a `RunConfig` to its problems. None edits the config, and none needs
torch, an engine or a process group. A limit that is an engine's own names the engine.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from typing import Any

from megatron_precision.checks import layout, own_code
from megatron_precision.checks.layout import DATA_PARALLEL_SIZE, value_at
from megatron_precision.config import user_files
from megatron_precision.config.errors import Problem, UserError, unknown_name
from megatron_precision.config.overrides import bounds
from megatron_precision.config.schema import (
    RECOMPUTE_MODULES,
    TRANSFORMER_ENGINE_FUSIONS,
    RunConfig,
)
from megatron_precision.data.prompts import set_problems
from megatron_precision.precision.policy import DTYPES, is_precision
from megatron_precision.rewards.scorers import SCORERS


def algorithm_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield what the chosen algorithm cannot work with."""
    row = own_code.algorithm_or_none(config)
    if row and row.dynamic_sampling and config.train.rollouts_per_prompt == 1:
        yield Problem(
            what="dynamic sampling looks for groups whose rewards differ",
            where="train.rollouts_per_prompt",
            got=f"1 with algo.name={config.algo.name}",
            expected="2 or more",
        )


def settings_problems(config: RunConfig) -> list[Problem]:
    """Return everything about a configuration that cannot run, in the order of its sections."""
    out_of_bounds = list(_out_of_bounds(config))
    found = [*_names(config), *out_of_bounds, *_windows(config)]
    impossible = {p.where for p in out_of_bounds if bounds()[p.where].least == 1}
    return [
        *found,
        *_layout_of_the_rest(config, impossible),
        *_task(config),
        *algorithm_problems(config),
        *_loss_scale(config),
        *_kernels_and_memory(config),
    ]


def _layout_of_the_rest(config: RunConfig, impossible: set[str]) -> list[Problem]:
    """Return the layout problems that no size of zero or less causes.

    Such a size is taken as 1, and problems that name it are left out.
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
    """Describe a precision that names no policy."""
    problem = unknown_name("precision", where, got, DTYPES)
    expected = f"{problem.expected}; or TRAIN/ROLLOUT, such as bf16/fp16"
    return dataclasses.replace(problem, expected=expected)


def _names(config: RunConfig) -> Iterator[Problem]:
    if not is_precision(config.precision):
        yield unknown_precision("precision", config.precision)
    yield from own_code.algorithm_problems(config)


def _out_of_bounds(config: RunConfig) -> Iterator[Problem]:
    for path, allowed in bounds().items():
        value = value_at(config, path)
        if not allowed.allow(value):
            yield Problem("value out of range", path, str(value), allowed.words)


def _windows(config: RunConfig) -> Iterator[Problem]:
    for section, low, high in (
        ("warm_start", "target_accuracy_low", "target_accuracy_high"),
        ("perfectible", "accuracy_low", "accuracy_high"),
    ):
        lower, upper = value_at(config, f"{section}.{low}"), value_at(config, f"{section}.{high}")
        if lower >= upper:
            yield Problem(
                "no value is within these bounds",
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
    if user_files.is_reference(task.scorer):
        yield from own_code.scorer_problems(config)
    elif task.scorer not in SCORERS and not _SCORER.fullmatch(task.scorer):
        problem = unknown_name("scorer", "task.scorer", task.scorer, list(SCORERS))
        expected = f"{problem.expected}; or MODULE:FUNCTION or FILE.py:FUNCTION of your own"
        yield dataclasses.replace(problem, expected=expected)


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
            what="FP32 parameters are their own main copies and cannot be offloaded",
            where="memory.offload_trainer",
            got=f"true with the precision {config.precision}",
            expected="false, or a 16-bit trainer",
        )
