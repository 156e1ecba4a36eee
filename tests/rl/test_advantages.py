"""Advantages against numbers worked by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_precision.rl.advantages import group_mean_centred, zero_variance_share


def test_advantage_is_reward_minus_group_mean_without_a_standard_deviation() -> None:
    # Group 0: mean (1+0+0+1)/4 = 0.5. Group 1: mean (0+0+0+1)/4 = 0.25. Group 2: mean 7/4 = 1.75.
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [4.0, 0.0, 1.0, 2.0]])
    expected = torch.tensor(
        [[0.5, -0.5, -0.5, 0.5], [-0.25, -0.25, -0.25, 0.75], [2.25, -1.75, -0.75, 0.25]]
    )
    advantages = group_mean_centred(rewards)
    assert torch.equal(advantages, expected)
    assert advantages.dtype == rewards.dtype


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1.0 / 3.0, -7.3e9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero(reward: float, dtype: torch.dtype) -> None:
    # Six times 0.1, divided by 6, is not 0.1 in binary: the naive difference is not 0.
    rewards = torch.full((2, 6), reward, dtype=dtype)
    assert torch.equal(group_mean_centred(rewards), torch.zeros_like(rewards))


def test_one_rollout_in_a_group_has_advantage_zero() -> None:
    assert torch.equal(group_mean_centred(torch.tensor([[0.7], [0.2]])), torch.zeros(2, 1))


def test_zero_variance_share_counts_groups() -> None:
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.1, 0.1, 0.2]])
    assert zero_variance_share(rewards) == 0.5


def test_no_group_at_all_is_defined() -> None:
    rewards = torch.zeros(0, 5)
    assert group_mean_centred(rewards).shape == (0, 5)
    assert zero_variance_share(rewards) == 0.0


def test_a_reward_that_is_not_finite_names_every_group_that_holds_one() -> None:
    rewards = torch.tensor([[0.0, 1.0], [torch.nan, 1.0], [0.0, 0.0], [torch.inf, 0.0]])
    for function in (group_mean_centred, zero_variance_share):
        with pytest.raises(ValueError, match=r"groups \[1, 3\]"):
            function(rewards)


@pytest.mark.parametrize(
    "rewards", [torch.zeros(4), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)]
)
def test_rewards_of_another_shape_or_kind_are_refused(rewards: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="num_groups, group_size"):
        group_mean_centred(rewards)


def test_groups_without_rollouts_are_refused() -> None:
    with pytest.raises(ValueError, match="group_size of at least 1"):
        group_mean_centred(torch.zeros(3, 0))
