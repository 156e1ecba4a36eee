"""Recipes by name: each resolves, and precision is all that two precisions differ in."""

from __future__ import annotations

import pytest

import recipes
from megatron_precision.config import to_dict
from megatron_precision.errors import UserError


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_a_recipe_is_named_as_it_is_listed(name: str) -> None:
    assert recipes.build(name).recipe == name


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_fp16_and_bf16_differ_in_precision_only(name: str) -> None:
    for build in (recipes.RECIPES[name], lambda precision: recipes.build(name, precision)):
        fp16, bf16 = to_dict(build(precision="fp16")), to_dict(build(precision="bf16"))
        assert (fp16.pop("precision"), bf16.pop("precision")) == ("fp16", "bf16")
        assert fp16 == bf16


def test_the_models_are_those_of_the_experiment() -> None:
    dense, moe = recipes.build("sanity.tiny_dense"), recipes.build("sanity.tiny_moe")
    assert (dense.parallel.tp_size, dense.parallel.rollout_tp_size) == (2, 2)
    assert (moe.model.num_experts, moe.model.num_experts_per_tok) == (8, 2)
    assert (moe.parallel.tp_size, moe.parallel.ep_size, moe.parallel.dp_size) == (1, 2, 2)


def test_precision_and_algorithm_and_overrides_are_applied() -> None:
    config = recipes.build("sanity.tiny_moe", "bf16/fp16", "PPO", ["seed=7"])
    assert (config.precision, config.algo.name, config.seed) == ("bf16/fp16", "PPO", 7)


def test_every_unknown_name_is_reported_with_its_nearest_and_all_valid_names() -> None:
    with pytest.raises(UserError) as caught:
        recipes.build("sanity.tinydense", "pf16", "pg-seq-si", ["train.iteration=1"])
    recipe, precision, algo, path = caught.value.problems
    assert "sanity.tiny_dense" in recipe.remedy
    assert "sanity.tiny_moe" in recipe.expected
    assert "fp16" in precision.remedy
    assert "bf16/fp16" in precision.expected
    assert "PG-Seq-IS" in algo.remedy
    assert "PPO" in algo.expected
    assert "train.iterations" in path.remedy
