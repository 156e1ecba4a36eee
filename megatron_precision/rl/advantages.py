"""Advantages: how much better a rollout did than its group.

Shapes: [num_groups, group_size], a row holding the rollouts of one prompt.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
    _check_rewards(rewards)
    wide = rewards.to(torch.float64)
    centred = wide - wide.mean(dim=1, keepdim=True)
    return centred.masked_fill(_zero_variance(rewards), 0.0).to(rewards.dtype)


def zero_variance_share(rewards: Tensor) -> float:
    """Share of groups whose rewards are all equal: they carry no gradient.

    Args:
        rewards: [num_groups, group_size], floating point.

    Returns:
        A number from 0 to 1; 0 where there is no group.

    Raises:
        ValueError: as `group_mean_centred`.
    """
    _check_rewards(rewards)
    if rewards.shape[0] == 0:
        return 0.0
    return float(_zero_variance(rewards).to(torch.float64).mean())


def _zero_variance(rewards: Tensor) -> Tensor:
    return (rewards == rewards[:, :1]).all(dim=1, keepdim=True)


def _check_rewards(rewards: Tensor) -> None:
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
