"""Rollout correction: the weight on each token's policy loss, from the engine's probabilities.

The rollouts were sampled from mu (the engine), the gradient is taken of pi_theta (the trainer).
A correction weighs a token's loss by a ratio of the two. Weights never carry gradient.

A new correction is a function here and an entry in `CORRECTIONS`; it may read old_logprobs, and
sets a token's weight to 0 to leave the token out of the loss (its place in the mean stays).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_precision.config import AlgorithmConfig
from megatron_precision.rl.algorithms import Correction


@dataclass(frozen=True)
class PolicyInputs:
    """What a policy loss and a correction may read; made by `losses.token_loss`.

    Every tensor is [num_seqs, num_tokens], of the trainer's log-prob dtype (FP32), except
    `advantages`. Where `mask` is False the log-probs are 0, whatever the caller's padding held.

    Attributes:
        train_logprobs: pi_theta, with gradient.
        old_logprobs: pi_old, the trainer before the update; None where the algorithm needs none.
        rollout_logprobs: mu, the engine.
        advantages: [num_seqs, 1].
        mask: bool, True at response tokens that count.
    """

    train_logprobs: Tensor
    old_logprobs: Tensor | None
    rollout_logprobs: Tensor
    advantages: Tensor
    mask: Tensor


def clamped_exp(log_weight: Tensor, log_weight_clamp: float) -> Tensor:
    """exp(min(log_weight, log_weight_clamp)), with nan for a log-weight that is not finite.

    Only the upper side is clamped: exp(20) = 4.9e8 is the largest weight, and no product of it
    with an advantage leaves FP32. The lower side needs none, since exp of a very negative number
    is a small one or 0, which is what the weight is; a lower clamp would bias it upwards and cut
    the gradient of a token that has become unlikely.

    Where the clamp acts the gradient is 0.

    A log-prob that is not finite is an error of the side that computed it. A clamp would turn
    it into an ordinary weight, so it is kept as nan, and the loss becomes nan for all to see.
    """
    weight = torch.exp(log_weight.clamp(max=log_weight_clamp))
    return torch.where(torch.isfinite(log_weight), weight, torch.nan)


def no_correction(inputs: PolicyInputs, constants: AlgorithmConfig) -> Tensor:
    """Weight 1 on every token: mu is taken for pi_old, or for pi_theta."""
    return torch.ones_like(inputs.rollout_logprobs)


def sequence_importance(inputs: PolicyInputs, constants: AlgorithmConfig) -> Tensor:
    """rho_theta = prod_t pi_theta(y_t) / mu(y_t), the same on every token of a sequence.

        rho_theta = exp(min(sum_t (train_logprobs - rollout_logprobs), log_weight_clamp))

    The sum is over response tokens, in FP64, so that it does not depend on how far a batch is
    padded. The current policy enters, without gradient: no old-log-prob pass is needed.

    Source: arXiv 2510.26788, PG-Seq-IS.
    """
    log_ratio = inputs.train_logprobs.detach().double() - inputs.rollout_logprobs.double()
    log_weight = log_ratio.sum(dim=1, keepdim=True)
    weight = clamped_exp(log_weight, constants.log_weight_clamp)
    return weight.to(inputs.rollout_logprobs.dtype).expand_as(inputs.rollout_logprobs)


CORRECTIONS: dict[Correction, Callable[[PolicyInputs, AlgorithmConfig], Tensor]] = {
    "none": no_correction,
    "seq_is": sequence_importance,
}
