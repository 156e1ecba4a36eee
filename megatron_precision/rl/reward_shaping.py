"""Reward shaping: what is added to the task's reward before groups are compared.

Shapes: [num_groups, group_size]. A new shaping is a function here and an entry in `SHAPINGS`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_precision.config import AlgorithmConfig
from megatron_precision.rl.algorithms import RewardShaping


def unshaped(
    rewards: Tensor, response_tokens: Tensor, max_response_tokens: int, constants: AlgorithmConfig
) -> Tensor:
    """The task's reward as it is."""
    return rewards


def overlong(
    rewards: Tensor, response_tokens: Tensor, max_response_tokens: int, constants: AlgorithmConfig
) -> Tensor:
    """DAPO's soft overlong punishment: a penalty that grows over the last part of the limit.

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
    """Refuse rewards that no group can be made of.

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
