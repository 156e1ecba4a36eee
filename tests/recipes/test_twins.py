"""A twin is its recipe in small: what a run learns by is the same."""

from __future__ import annotations

import dataclasses

import pytest

import recipes
from megatron_precision.checks import settings
from recipes.twins import twin

ROWS = [(name, size) for name in recipes.sized_names() for size in recipes.sized(name).layouts]


@pytest.mark.parametrize(("name", "size"), ROWS, ids=str)
def test_a_twin_is_valid_on_two_processes_and_keeps_what_its_recipe_is(
    name: str, size: object
) -> None:
    config = recipes.recipe(name, size.gpus, size.gpu_gb)  # type: ignore[attr-defined]
    twins = [twin(config)]
    if config.parallel.pp_size > 1:
        twins.append(twin(config, pipeline=True))
    for small in twins:
        assert settings.settings_problems(small) == []
        assert small.parallel.world_size == 2
        for part in dataclasses.fields(config):
            if part.name not in (
                "recipe", "model", "parallel", "task", "rollout", "train", "eval",
            ):  # fmt: skip
                assert getattr(small, part.name) == getattr(config, part.name)
        assert small.model.model_type == config.model.model_type
        assert small.model.tie_word_embeddings == config.model.tie_word_embeddings
        assert small.model.rope_scaling_factor == config.model.rope_scaling_factor
        assert small.rollout.temperature == config.rollout.temperature
        assert bool(small.train.micro_batch_tokens) == bool(config.train.micro_batch_tokens)
    kinds = ("tp_size", "pp_size", "ep_size", "etp_size", "rollout_tp_size")
    for kind in kinds:
        kept = any(getattr(small.parallel, kind) > 1 for small in twins)
        assert kept == (getattr(config.parallel, kind) > 1)


def test_a_recipe_without_pipeline_has_no_such_twin() -> None:
    with pytest.raises(ValueError, match="no pipeline"):
        twin(recipes.build("dense14b.dapo"), pipeline=True)
