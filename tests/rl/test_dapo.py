"""DAPO's parts by hand: standardised advantages, overlong shaping, dual clip, contrast."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from megatron_precision.config.schema import AlgorithmConfig
from megatron_precision.rl.advantages import (
    group_advantages,
    group_mean_centred,
    group_standardised,
    overlong,
    with_contrast,
)
from megatron_precision.rl.algorithms import ALGORITHMS
from megatron_precision.rl.losses import token_loss

DAPO, PPO = ALGORITHMS["DAPO"], ALGORITHMS["PPO"]
CONSTANTS = AlgorithmConfig(overlong_buffer_share=0.2, overlong_penalty=1.0)
FP64 = torch.float64


def test_standardised_advantages_by_hand() -> None:
    # (1, 0, 0, 1): mean 1/2, squares 4 * 1/4 = 1, over 3: deviation 1/sqrt 3; A = sqrt(3)/2.
    # (1, 0, 0, 0): mean 1/4, squares 9/16 + 3/16 = 3/4, over 3: deviation 1/2; A = 1.5, -0.5.
    # (4, 0, 1, 3): mean 2, squares 4 + 4 + 1 + 1 = 10, over 3: A = 2 / sqrt(10/3), ...
    rewards = torch.tensor([[1, 0, 0, 1], [1, 0, 0, 0], [4, 0, 1, 3]], dtype=FP64)
    half, unit = math.sqrt(3) / 2, math.sqrt(3 / 10)
    expected = [
        [half, -half, -half, half],
        [1.5, -0.5, -0.5, -0.5],
        [2 * unit, -2 * unit, -unit, unit],
    ]
    torch.testing.assert_close(group_standardised(rewards), torch.tensor(expected, dtype=FP64))


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1, 1.0 / 3.0, -7.3e9])
@pytest.mark.parametrize("size", [1, 6])
def test_a_group_without_contrast_has_advantage_zero(reward: float, size: int) -> None:
    rewards = torch.full((2, size), reward)
    assert torch.equal(group_standardised(rewards), torch.zeros(2, size))


def test_standardising_forgets_scale_and_offset() -> None:
    rewards = torch.tensor([[1.0, 0.0, 1.0, 1.0, 0.0]], dtype=FP64)
    torch.testing.assert_close(group_standardised(2 * rewards - 1), group_standardised(rewards))
    assert not torch.equal(group_mean_centred(2 * rewards - 1), group_mean_centred(rewards))


def test_standardised_is_mean_centred_where_the_deviation_is_one() -> None:
    # (0, 1, 2): squares 1 + 0 + 1, over 2: deviation 1.
    rewards = torch.tensor([[0.0, 1.0, 2.0]])
    assert torch.equal(group_standardised(rewards), group_mean_centred(rewards))


def test_no_group_at_all_is_defined() -> None:
    assert group_standardised(torch.zeros(0, 5)).shape == (0, 5)
    assert with_contrast(torch.zeros(0, 5)).shape == (0,)


def test_the_overlong_penalty_grows_over_the_buffer() -> None:
    # Limit 20,480, buffer 4,096: free up to 16,384; half at 18,432; whole at the limit.
    tokens = torch.tensor([[0, 16384, 17408, 18432, 20480]])
    expected = torch.tensor([[1.0, 1.0, 0.75, 0.5, 0.0]])
    assert torch.equal(overlong(torch.ones(1, 5), tokens, 20480, CONSTANTS), expected)
    doubled = dataclasses.replace(CONSTANTS, overlong_penalty=2.0)
    expected = torch.tensor([[1.0, 1.0, 0.5, 0.0, -1.0]])
    assert torch.equal(overlong(torch.ones(1, 5), tokens, 20480, doubled), expected)


def test_a_buffer_that_is_no_whole_number_of_tokens_is_taken_as_it_is() -> None:
    # Limit 96, buffer 19.2, free up to 76.8: at 77 tokens 0.2 / 19.2 = 1/96.
    got = overlong(torch.zeros(1, 3), torch.tensor([[76, 77, 96]]), 96, CONSTANTS)
    torch.testing.assert_close(got, torch.tensor([[0.0, -1 / 96, -1.0]]))


def test_advantages_are_taken_of_shaped_rewards_where_the_row_says_so() -> None:
    # Limit 10, buffer 2. Right answers of 8, 9 and 10 tokens: 1, 1/2, 0; mean 1/2, deviation 1/2.
    rewards, tokens = torch.ones(1, 3, dtype=FP64), torch.tensor([[8, 9, 10]])
    arguments = {"rewards": rewards, "response_tokens": tokens, "max_response_tokens": 10}
    shaped = group_advantages(DAPO, CONSTANTS, **arguments)
    torch.testing.assert_close(shaped, torch.tensor([[1.0, 0.0, -1.0]], dtype=FP64))
    assert torch.equal(group_advantages(PPO, CONSTANTS, **arguments), torch.zeros(1, 3, dtype=FP64))
    # A penalty of 0 and a free deviation lead back to zero variance.
    free = dataclasses.replace(CONSTANTS, overlong_penalty=0.0)
    assert torch.equal(group_advantages(DAPO, free, **arguments), torch.zeros(1, 3, dtype=FP64))


def test_lengths_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match=r"response_tokens: got shape \[3\]"):
        overlong(torch.ones(1, 3), torch.tensor([1, 2, 3]), 10, CONSTANTS)


def test_contrast_is_asked_of_every_group() -> None:
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0], [0.1, 0.1, 0.2]])
    assert with_contrast(rewards).tolist() == [False, True, False, True]


def test_dapo_has_ppos_token_losses() -> None:
    generator = torch.Generator().manual_seed(3)
    old = -torch.rand(3, 4, generator=generator)
    inputs = {
        "train_logprobs": old + 0.5 * torch.randn(3, 4, generator=generator),
        "old_logprobs": old,
        "rollout_logprobs": old - 0.3,
        "advantages": torch.tensor([1.0, -1.0, 0.5]),
        "mask": torch.ones(3, 4, dtype=torch.bool),
    }
    dapo, ppo = (token_loss(row, CONSTANTS, **inputs) for row in (DAPO, PPO))
    assert torch.equal(dapo.loss, ppo.loss)


def test_dual_clip_bounds_the_loss_where_the_advantage_is_negative() -> None:
    # c = 10. A = -2, r = 12: max(24, 2.56) = 24, at most 20: 20, gradient 0.
    #         A = -2, r = 9:  18, gradient 18.      A = -2, r = 0.5: 0.8 * 2 = 1.6, clipped.
    #         A = 1,  r = 12: -1.28, clipped; c has no say.
    ratio = torch.tensor([[12.0, 9.0, 0.5], [12.0, 1.0, 1.0]], dtype=FP64)
    old = torch.full((2, 3), -3.0, dtype=FP64)
    train = (old + ratio.log()).requires_grad_()
    result = token_loss(
        PPO,
        dataclasses.replace(CONSTANTS, dual_clip=10.0),
        train_logprobs=train,
        old_logprobs=old,
        rollout_logprobs=old,
        advantages=torch.tensor([-2.0, 1.0], dtype=FP64),
        mask=torch.ones(2, 3, dtype=torch.bool),
    )
    (grad,) = torch.autograd.grad(result.loss.sum(), train)
    expected = torch.tensor([[20.0, 18.0, 1.6], [-1.28, -1.0, -1.0]], dtype=FP64)
    torch.testing.assert_close(result.loss.detach(), expected)
    torch.testing.assert_close(
        grad, torch.tensor([[0.0, 18.0, 0.0], [0.0, -1.0, -1.0]], dtype=FP64)
    )
    assert result.clipped.tolist() == [[True, False, True], [True, False, False]]
