"""Verdicts, refusals, and the layouts that they name."""

from __future__ import annotations

import dataclasses
import itertools
import time

import pytest

import recipes
from megatron_precision.checks import settings
from megatron_precision.cli.arguments import sized_recipe
from megatron_precision.config import overrides
from megatron_precision.config.errors import UserError
from megatron_precision.config.schema import ParallelConfig
from megatron_precision.preflight import search


def test_the_nearest_layout_fits_is_valid_and_changes_little() -> None:
    config = recipes.build("dense14b.dapo")
    whole = dataclasses.replace(config, parallel=ParallelConfig(8, 1, rollout_tp_size=8))
    assert not search.judge(whole, 80).fits
    found = search.nearest(whole, 80)
    assert found is not None
    assert found.fits
    assert settings.settings_problems(found.config) == []
    # TP alone is changed; half of the KV heads' ranks do not fit.
    assert found.config.parallel == ParallelConfig(8, 8, sequence_parallel=True, rollout_tp_size=8)


def test_a_refusal_names_settings_that_then_fit() -> None:
    config = recipes.build("dense14b.dapo")
    whole = dataclasses.replace(config, parallel=ParallelConfig(8, 1, rollout_tp_size=8))
    problem = search.refusal(search.judge(whole, 80))
    assert "does not fit 8 GPUs of 80 GB" in problem.what
    words = problem.remedy.partition("--set ")[2].partition(" (")[0].split()
    assert search.judge(overrides.apply(whole, words), 80).fits


def test_where_no_layout_fits_other_sizes_are_named() -> None:
    with pytest.raises(UserError) as caught:
        sized_recipe("moe.pg_seq_tis", gpus=8, gpu_gb=80)
    (problem,) = caught.value.problems
    for words in ("no layout of 8 GPUs of 80 GB fits", "8 GPUs of 141 GB", "16 GPUs of 80 GB"):
        assert words in problem.remedy
    # Without the optimizer's 46 GB, and without the KV cache beside the trainer.
    words = problem.remedy.partition("with memory.")[2].partition(" would fit")[0].split()
    config = recipes.build("moe.pg_seq_tis", overrides=["parallel.world_size=8"])
    layout = [word for word in words if word.startswith("parallel.")]
    sizes = {word.partition("=")[0] for word in layout}
    # Sizes of 1 are left out of a description.
    ones = {"parallel.pp_size", "parallel.ep_size", "parallel.etp_size", "parallel.tp_size"}
    changed = [*(f"{path}=1" for path in ones - sizes), f"memory.{words[0]}", *words[1:]]
    assert search.judge(overrides.apply(config, changed), 80).fits


def test_a_cache_that_is_too_large_alone_is_made_smaller() -> None:
    config = recipes.build("dense14b.dapo", overrides=["rollout.kv_cache_mib=40960"])
    assert not search.judge(config, 80).fits
    found = search.nearest(config, 80)
    assert found is not None
    assert found.config.parallel == config.parallel
    assert 16 * 1024 <= found.config.rollout.kv_cache_mib < 40960


def test_a_size_that_nobody_made_a_layout_for_is_refused_with_one_that_fits() -> None:
    with pytest.raises(UserError) as caught:
        sized_recipe("octothinker.octothinker_3b", gpus=64)
    (problem,) = caught.value.problems
    assert "8 GPUs of 80 GB" in problem.expected
    assert "parallel.world_size=64" in problem.remedy
    assert "never run" in problem.remedy


def test_every_candidate_is_valid_and_no_valid_layout_is_left_out() -> None:
    config = recipes.build("moe.grpo_seq_mis")
    found = {candidate.parallel for candidate in search._candidates(config, 16)}
    every = set()
    for tp, pp, ep, etp, rollout_tp in itertools.product((1, 2, 4, 8, 16), repeat=5):
        layout = ParallelConfig(16, tp, pp, ep, etp, tp > 1, rollout_tp)
        if not settings.settings_problems(dataclasses.replace(config, parallel=layout)):
            every.add(layout)
    assert found == every


def test_a_search_over_a_thousand_ranks_takes_about_a_second() -> None:
    config = recipes.build("moe.grpo_seq_mis")
    wide = dataclasses.replace(config, parallel=ParallelConfig(1024, 1, rollout_tp_size=1))
    begin = time.process_time()
    assert search.nearest(wide, 80) is not None
    assert time.process_time() - begin < 3
