"""The table of algorithms fits the functions that implement its parts."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from megatron_precision.config.schema import AlgorithmConfig
from megatron_precision.rl.advantages import ADVANTAGES, SHAPINGS
from megatron_precision.rl.algorithms import (
    ALGORITHMS,
    RATIO_TO_OLD,
    Advantage,
    Correction,
    PolicyLoss,
    RewardShaping,
)
from megatron_precision.rl.correction import CORRECTIONS, PolicyInputs
from megatron_precision.rl.losses import POLICY_LOSSES

ROOT = Path(__file__).resolve().parents[2]


def test_every_part_that_a_row_can_name_has_a_function() -> None:
    assert set(POLICY_LOSSES) == set(get_args(PolicyLoss))
    assert set(CORRECTIONS) == set(get_args(Correction))
    assert set(ADVANTAGES) == set(get_args(Advantage))
    assert set(SHAPINGS) == set(get_args(RewardShaping))


def test_rows_stand_under_their_own_names() -> None:
    assert all(name == row.name for name, row in ALGORITHMS.items())


def test_the_default_algorithm_exists() -> None:
    assert AlgorithmConfig().name in ALGORITHMS


def test_the_rows_are_the_issues_by_name_and_part() -> None:
    norm = "seq-mean-token-sum-norm"
    rows = {
        row.name: (row.policy_loss, row.correction, row.aggregation, row.needs_old_logprobs)
        for row in ALGORITHMS.values()
    }
    assert rows == {
        "PPO": ("ppo_clip", "none", norm, True),
        "PPO-Token-TIS": ("ppo_clip", "token_tis", norm, True),
        "PPO-Seq-TIS": ("ppo_clip", "seq_tis", norm, True),
        "PPO-Seq-MIS": ("ppo_clip", "seq_mis", norm, True),
        "PPO-Token-IcePop": ("ppo_clip", "token_mask", norm, True),
        "PG-Seq-IS": ("policy_gradient", "seq_is", norm, False),
        "PG-Seq-TIS": ("policy_gradient", "seq_tis", norm, False),
        "PG-Seq-MIS": ("policy_gradient", "seq_mis", norm, False),
        "Vanilla-GSPO": ("gspo_clip", "none", "seq-mean-token-mean", True),
        "DAPO": ("ppo_clip", "none", "token-mean", True),
    }


def test_dapo_alone_shapes_rewards_standardises_and_samples_again() -> None:
    for name, row in ALGORITHMS.items():
        parts = (row.reward_shaping, row.advantage, row.dynamic_sampling)
        dapo = ("overlong", "group_mean_std", True)
        assert parts == (dapo if name == "DAPO" else ("none", "group_mean", False)), name


def test_the_constants_are_those_of_the_sources() -> None:
    constants = AlgorithmConfig()
    assert (constants.clip_low, constants.clip_high, constants.dual_clip) == (0.2, 0.28, 0.0)
    assert (constants.sequence_clip_low, constants.sequence_clip_high) == (3e-4, 4e-4)
    assert constants.correction_threshold == 3.0
    assert (constants.token_mask_low, constants.token_mask_high) == (0.5, 5.0)
    assert constants.overlong_buffer_share * 20480 == 4096


def test_a_policy_loss_that_reads_old_logprobs_says_so() -> None:
    inputs = PolicyInputs(
        train_logprobs=torch.zeros(1, 2),
        old_logprobs=None,
        rollout_logprobs=torch.zeros(1, 2),
        advantages=torch.ones(1, 1),
        mask=torch.ones(1, 2, dtype=torch.bool),
    )
    for name, function in POLICY_LOSSES.items():
        if name in RATIO_TO_OLD:
            with pytest.raises(ValueError, match=f"policy loss {name}: got no old_logprobs"):
                function(inputs, AlgorithmConfig())
        else:
            assert function(inputs, AlgorithmConfig()).loss.shape == (1, 2)


def test_the_loop_names_no_algorithm_and_no_part() -> None:
    parts = {*get_args(PolicyLoss), *get_args(Correction), *get_args(Advantage)}
    names = {*ALGORITHMS, *parts, "overlong"} - {"none"}
    for path in (ROOT / "megatron_precision" / "train").glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert not [name for name in names if f'"{name}"' in text], path.name
