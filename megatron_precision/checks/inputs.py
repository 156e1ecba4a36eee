"""Checks what a run reads besides its configuration: checkpoint, prompts and scorer.

A dry run skips this: a recipe's model and prompts need not be on the machine that reads it. This
module imports no torch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from megatron_precision.checks import own_code
from megatron_precision.config import user_files
from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.schema import ModelConfig, RunConfig, StartConfig
from megatron_precision.data.prompts import parse_set, read_prompts
from megatron_precision.layouts.hf_config import read_model, weights_missing

# A run builds its own initial weights from it, or none; a checkpoint does not say it.
_OF_NO_CHECKPOINT = ("initializer_range",)


def input_problems(config: RunConfig, *, training: bool = True) -> list[Problem]:
    """List everything that is wrong with a run's checkpoint, prompt files and scorer.

    Args:
        config: a valid configuration.
        training: training prompts are needed.
    """
    if config.start.kind == "warm_start":
        return []
    found = [*_checkpoint(config), *_sets(config, training)]
    unusable = own_code.scorer_problems(config)
    sets = (*config.task.train_sets, *config.task.eval_sets)
    if user_files.is_reference(config.task.scorer) and sets and not found and not unusable:
        unusable = own_code.try_scorer(config, read_prompts(parse_set(sets[0]).path)[0].answer)
    return [*found, *unusable]


def with_checkpoint(config: RunConfig, folder: str) -> RunConfig:
    """Return the configuration with a Hugging Face folder's model, on chat prompts.

    Raises:
        UserError: where the folder holds no model that is known here.
    """
    return dataclasses.replace(
        config,
        model=read_model(Path(folder) / "config.json"),
        start=StartConfig("checkpoint", folder),
        task=dataclasses.replace(config.task, name="chat"),
    )


def check(config: RunConfig, *, training: bool = True) -> None:
    """
    Raises:
        UserError: lists all of `problems` when there are any.
    """
    found = input_problems(config, training=training)
    if found:
        raise UserError(found)


def _checkpoint(config: RunConfig) -> Iterator[Problem]:
    start = config.start
    if not start.checkpoint:
        model = f"a folder with {start.public_name}" if start.public_name else "a folder"
        yield Problem(
            what="no checkpoint to start from",
            where="start.checkpoint",
            got="nothing",
            expected=f"{model} as transformers saves it",
            remedy="--set start.checkpoint=DIR",
        )
        return
    try:
        found = read_model(Path(start.checkpoint) / "config.json")
    except UserError as wrong:
        yield from wrong.problems
        return
    yield from _differences(config.model, found, start.checkpoint)
    yield from weights_missing(Path(start.checkpoint))


def _differences(model: ModelConfig, found: ModelConfig, folder: str) -> Iterator[Problem]:
    for part in dataclasses.fields(ModelConfig):
        wanted, there = getattr(model, part.name), getattr(found, part.name)
        if wanted != there and part.name not in _OF_NO_CHECKPOINT:
            yield Problem(
                what="the checkpoint is another model than the recipe's",
                where=f"{folder}, model.{part.name}",
                got=str(there),
                expected=str(wanted),
                remedy=f"--set model.{part.name}={there} where that is meant",
            )


def _sets(config: RunConfig, training: bool) -> Iterator[Problem]:
    task = config.task
    if training and not task.train_sets:
        yield Problem(
            what="no prompts to train on",
            where="task.train_sets",
            got="nothing",
            expected="NAME=PATH of a .parquet or .jsonl file, one or several with commas between",
            remedy="--set task.train_sets=math=FILE",
        )
    for text in (*task.train_sets, *task.eval_sets):
        try:
            read_prompts(parse_set(text).path)
        except UserError as wrong:
            yield from wrong.problems
