"""Recipes by name: each resolves, and precision is all that two precisions differ in."""

from __future__ import annotations

import dataclasses

import pytest

import recipes
from megatron_precision.checks import settings
from megatron_precision.cli.arguments import sized_recipe
from megatron_precision.config.errors import UserError
from megatron_precision.config.schema import to_dict
from megatron_precision.preflight import memory, search
from recipes.layouts import SIZES, Size


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_a_recipe_is_named_as_it_is_listed(name: str) -> None:
    assert recipes.build(name).recipe == name


@pytest.mark.parametrize("name", list(recipes.RECIPES))
def test_fp16_and_bf16_differ_in_precision_only(name: str) -> None:
    for build in (recipes.RECIPES[name].function, lambda precision: recipes.build(name, precision)):
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


SIZED = [(name, size) for name in recipes.sized_names() for size in recipes.sized(name).layouts]
PRECISIONS = ("bf16", "fp16", "bf16/fp16", "bf16/fp32", "fp16/fp32")


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("name", "size"), SIZED, ids=lambda value: str(value))
def test_a_layout_is_valid_and_fits_or_is_refused_with_one_that_fits(
    name: str, size: Size, precision: str
) -> None:
    layout = recipes.sized(name).layouts[size]
    config = recipes.RECIPES[name].function(precision=precision, chosen=layout)
    assert settings.settings_problems(config) == []
    assert (config.parallel.world_size, config.precision) == (size.gpus, precision)
    verdict = search.judge(config, size.gpu_gb)
    if "/fp32" in precision and not verdict.fits:
        assert "nearest that fit" in search.refusal(verdict).remedy
    else:
        assert verdict.fits


@pytest.mark.parametrize("name", recipes.sized_names())
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_every_size_that_is_asked_for_has_a_layout_or_a_refusal(name: str, size: Size) -> None:
    if size in recipes.sized(name).layouts:
        config = recipes.recipe(name, size.gpus, size.gpu_gb)
        assert config.parallel.world_size == size.gpus
        # Sizes differ in the layout and in what an engine holds, and in nothing that is learned.
        plain = recipes.recipe(name)
        same = {"parallel": plain.parallel, "rollout": plain.rollout}
        assert dataclasses.replace(config, **same) == plain
        return
    with pytest.raises(UserError, match="does not fit"):
        sized_recipe(name, size.gpus, size.gpu_gb)
    with pytest.raises(UserError, match=f"has no layout for {size}"):
        recipes.recipe(name, size.gpus, size.gpu_gb)


@pytest.mark.parametrize("name", recipes.sized_names())
def test_a_cache_holds_enough_sequences_of_the_full_length(name: str) -> None:
    for layout in recipes.sized(name).layouts.values():
        assert memory.kv_sequences(recipes.RECIPES[name].function(chosen=layout)) >= 4


def test_the_numbers_are_those_of_the_paper() -> None:
    dense, moe = recipes.build("dense14b.dapo"), recipes.build("moe.grpo_token_tis")
    for config in (dense, moe):
        assert (config.task.max_prompt_tokens, config.rollout.max_response_tokens) == (2048, 20480)
        shape = config.train
        assert (shape.prompts_per_iteration, shape.rollouts_per_prompt) == (512, 16)
        assert shape.steps_per_iteration == 16
    assert (dense.algo.name, dense.algo.dual_clip) == ("DAPO", 10.0)
    assert dense.algo.overlong_buffer_share * 20480 == 4096
    assert (dense.optimizer.weight_decay, dense.optimizer.warmup_steps) == (0.1, 10)
    assert (moe.optimizer.beta2, moe.optimizer.eps) == (0.95, 1e-15)
    sanity = recipes.build("sanity.r1d_1_5b")
    assert sanity.algo.name == "PG-Seq-IS"
    assert sanity.train.steps_per_iteration == 4
    # 20 epochs of 1,460 questions.
    assert abs(sanity.train.iterations * 64 - 20 * 1460) < 64
    octothinker = recipes.build("octothinker.octothinker_3b")
    assert octothinker.train.prompts_per_iteration == 128


def test_a_recipe_of_one_layout_refuses_a_size() -> None:
    with pytest.raises(UserError, match="one layout"):
        recipes.recipe("sanity.tiny_dense", gpus=8)


def test_memory_alone_chooses_the_fewest_gpus() -> None:
    assert recipes.recipe("moe.pg_seq_tis", gpu_gb=141).parallel.world_size == 8
    assert recipes.recipe("moe.pg_seq_tis").parallel.world_size == 32
