"""Shapes rewards and turns them into advantages: how much better a rollout did than its group.

Shapes: [num_groups, group_size], one row per prompt. A new shaping is a function here and an entry
in `SHAPINGS`; a new advantage a function and an entry in `ADVANTAGES`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_precision.config.schema import AlgorithmConfig
from megatron_precision.rl.algorithms import Advantage, Algorithm, RewardShaping, function_of


def unshaped(
    rewards: Tensor, response_tokens: Tensor, max_response_tokens: int, constants: AlgorithmConfig
) -> Tensor:
    """Return the task's reward unchanged."""
    return rewards


def overlong(
    rewards: Tensor, response_tokens: Tensor, max_response_tokens: int, constants: AlgorithmConfig
) -> Tensor:
    """Add DAPO's soft overlong penalty, which grows over the last part of the length limit.

        B = overlong_buffer_share * max_response_tokens
        R - overlong_penalty * clip((N - (max_response_tokens - B)) / B, 0, 1)

    N is the response's length; a truncated response has the limit's length, and the whole
    penalty. B need not be a whole number.

    Args:
        rewards: [num_groups, group_size], floating point, the task's.
        response_tokens: the same shape, int64: lengths of the responses.
        max_response_tokens: the limit on a response.
        constants: `overlong_buffer_share` and `overlong_penalty`.

    Returns:
        Shaped rewards of the same shape and dtype.

    Raises:
        ValueError: rewards that are no finite matrix, or lengths of another shape.

    Source: arXiv 2503.14476, section 3.4, where B is 4,096 of 20,480 tokens and a right answer
    has reward 1, a wrong one -1. Our tasks give 1 and 0, so the penalty weighs twice as much.
    """
    check_rewards(rewards)
    if response_tokens.shape != rewards.shape:
        raise ValueError(
            f"response_tokens: got shape {list(response_tokens.shape)}, expected that of the "
            f"rewards, {list(rewards.shape)}"
        )
    buffer = constants.overlong_buffer_share * max_response_tokens
    excess = response_tokens.to(torch.float64) - (max_response_tokens - buffer)
    penalty = constants.overlong_penalty * (excess / buffer).clamp(0.0, 1.0)
    return (rewards.to(torch.float64) - penalty).to(rewards.dtype)


SHAPINGS: dict[RewardShaping, Callable[[Tensor, Tensor, int, AlgorithmConfig], Tensor]] = {
    "none": unshaped,
    "overlong": overlong,
}


def check_rewards(rewards: Tensor) -> None:
    """Refuse rewards that do not form groups.

    Raises:
        ValueError: not a floating-point matrix, an empty group, or a reward that is not finite.
    """
    if rewards.ndim != 2 or not rewards.is_floating_point():
        raise ValueError(
            f"rewards: got shape {list(rewards.shape)} of {rewards.dtype}, "
            "expected floating point [num_groups, group_size]"
        )
    if rewards.shape[1] == 0:
        raise ValueError("rewards: got groups of no rollouts, expected group_size of at least 1")
    bad = (~torch.isfinite(rewards)).any(dim=1).nonzero().flatten().tolist()
    if bad:
        raise ValueError(
            f"rewards: groups {bad} hold a reward that is not finite; "
            "a scorer must return a finite number for every response"
        )


def group_mean_centred(rewards: Tensor) -> Tensor:
    """Subtract the mean of its group from each reward.

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
    """Subtract the mean of its group, and divide by the group's standard deviation.

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
    """Compute an iteration's advantages, by the algorithm's shaping and advantage.

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
    shaped = function_of(algorithm.reward_shaping, SHAPINGS)(
        rewards, response_tokens, max_response_tokens, constants
    )
    return function_of(algorithm.advantage, ADVANTAGES)(shaped)


def with_contrast(rewards: Tensor) -> Tensor:
    """Say which groups have two different rewards, [num_groups] bool; others carry no gradient.

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
    """Return the share of groups whose rewards are all equal; they carry no gradient.

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
