"""Advantages: how much better a rollout did than its group.

Shapes: [num_groups, group_size], a row holding the rollouts of one prompt.

A new advantage is a function here and an entry in `ADVANTAGES`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_precision.config import AlgorithmConfig
from megatron_precision.rl.algorithms import Advantage, Algorithm
from megatron_precision.rl.reward_shaping import SHAPINGS, check_rewards


def group_mean_centred(rewards: Tensor) -> Tensor:
    """Reward minus the mean of its group.

        A_i = R_i - mean_j R_j

    There is no division by the standard deviation. The mean is taken in FP64. A group whose
    rewards are all equal gives exactly 0, whatever its mean rounds to.

    Args:
        rewards: [num_groups, group_size], floating point.

    Returns:
        Advantages of the same shape and dtype.

    Raises:
        ValueError: not a floating-point matrix, an empty group, or a reward that is not finite.

    Source: arXiv 2510.26788, sanity test.
    """
    check_rewards(rewards)
    wide = rewards.to(torch.float64)
    centred = wide - wide.mean(dim=1, keepdim=True)
    return centred.masked_fill(_zero_variance(rewards), 0.0).to(rewards.dtype)


def group_standardised(rewards: Tensor) -> Tensor:
    """Reward minus the mean of its group, over the group's standard deviation.

        A_i = (R_i - mean_j R_j) / sqrt(sum_j (R_j - mean)^2 / (group_size - 1))

    In FP64. A group whose rewards are all equal gives exactly 0, and a group of one too.

    Args:
        rewards: [num_groups, group_size], floating point.

    Returns:
        Advantages of the same shape and dtype.

    Raises:
        ValueError: as `group_mean_centred`.

    Source: arXiv 2503.14476, its advantage. The paper leaves the divisor of the variance open; its
    released code has group_size - 1, as here, and adds 1e-6 to the deviation, which we do not:
    the one case that it guards gives 0 here.
    """
    check_rewards(rewards)
    wide = rewards.to(torch.float64)
    centred = wide - wide.mean(dim=1, keepdim=True)
    variance = centred.square().sum(dim=1, keepdim=True) / max(1, rewards.shape[1] - 1)
    equal = _zero_variance(rewards)
    scaled = centred / variance.masked_fill(equal, 1.0).sqrt()
    return scaled.masked_fill(equal, 0.0).to(rewards.dtype)


ADVANTAGES: dict[Advantage, Callable[[Tensor], Tensor]] = {
    "group_mean": group_mean_centred,
    "group_mean_std": group_standardised,
}


def group_advantages(
    algorithm: Algorithm,
    constants: AlgorithmConfig,
    *,
    rewards: Tensor,
    response_tokens: Tensor,
    max_response_tokens: int,
) -> Tensor:
    """Advantages of an iteration's rollouts, by the shaping and the advantage of `algorithm`.

    Args:
        algorithm: a row of `rl/algorithms.py`.
        constants: of the shaping.
        rewards: [num_groups, group_size] FP32, the task's.
        response_tokens: the same shape, int64: lengths of the responses.
        max_response_tokens: the limit on a response.

    Returns:
        [num_groups, group_size], of the rewards' dtype.

    Raises:
        ValueError: rewards that `group_mean_centred` refuses, or lengths of another shape.
    """
    shaped = SHAPINGS[algorithm.reward_shaping](
        rewards, response_tokens, max_response_tokens, constants
    )
    return ADVANTAGES[algorithm.advantage](shaped)


def with_contrast(rewards: Tensor) -> Tensor:
    """Which groups hold two different rewards: [num_groups] bool. The others carry no gradient.

    Args:
        rewards: [num_groups, group_size], floating point; the task's own, before any shaping:
            DAPO's filter asks for right and wrong answers, not for short and long ones.

    Raises:
        ValueError: as `group_mean_centred`.

    Source: arXiv 2503.14476, section 3.2, for rewards of two values.
    """
    check_rewards(rewards)
    return ~_zero_variance(rewards)[:, 0]


def zero_variance_share(rewards: Tensor) -> float:
    """Share of groups whose rewards are all equal: they carry no gradient.

    Args:
        rewards: [num_groups, group_size], floating point.

    Returns:
        A number from 0 to 1; 0 where there is no group.

    Raises:
        ValueError: as `group_mean_centred`.
    """
    without = ~with_contrast(rewards)
    return float(without.to(torch.float64).mean()) if len(without) else 0.0


def _zero_variance(rewards: Tensor) -> Tensor:
    return (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
