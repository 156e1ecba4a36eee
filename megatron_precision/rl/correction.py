"""Computes rollout corrections: a weight per token, from the engine's log-probs.

Rollouts are sampled from mu (the engine), and the gradient is taken of pi_theta (the trainer). A
correction weighs a token's loss by a ratio pi/mu. Weights carry no gradient. With a policy loss
that has a ratio pi_theta/pi_old, the correction supplies pi_old/mu; without one, pi_theta/mu.

A new correction is a function here and an entry in `CORRECTIONS`. It sets a token's weight to 0 to
mask its loss; the token still counts in the mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_precision.config.schema import AlgorithmConfig
from megatron_precision.rl.algorithms import Correction


@dataclass(frozen=True)
class PolicyInputs:
    """The inputs of a policy loss and a correction; `losses.token_loss` makes them.

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

    @property
    def anchor_logprobs(self) -> Tensor:
        """The log-probs of the policy above mu in the correction's ratio, detached.

        pi_old where the policy loss has a ratio to it, pi_theta where it has none.
        """
        return self.train_logprobs.detach() if self.old_logprobs is None else self.old_logprobs


@dataclass(frozen=True)
class CorrectionTerms:
    """The result of a correction; [num_seqs, num_tokens] each, without gradient.

    Attributes:
        weight: of the log-probs' dtype.
        cut: bool, True where a threshold changed the weight: truncated it, or set it to 0.
    """

    weight: Tensor
    cut: Tensor


def clamped_exp(log_weight: Tensor, log_weight_clamp: float) -> Tensor:
    """Return exp(min(log_weight, log_weight_clamp)); nan where a log-weight is not finite.

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


def no_correction(inputs: PolicyInputs, constants: AlgorithmConfig) -> CorrectionTerms:
    """Weigh every token by 1: mu is taken for pi_old, or for pi_theta."""
    ones = torch.ones_like(inputs.rollout_logprobs)
    return CorrectionTerms(ones, torch.zeros_like(inputs.mask))


def sequence_importance(inputs: PolicyInputs, constants: AlgorithmConfig) -> CorrectionTerms:
    """Weigh every token of a sequence by rho = prod_t pi(y_t) / mu(y_t).

        rho = exp(min(sum_t (log pi - log mu), log_weight_clamp))

    The sum is over response tokens, in FP64, so that it does not depend on how far a batch is
    padded.

    Source: arXiv 2510.26788, PG-Seq-IS.
    """
    return _truncated(inputs, _sequence_log_ratio(inputs), constants, math.inf)


def sequence_truncated(inputs: PolicyInputs, constants: AlgorithmConfig) -> CorrectionTerms:
    """Weigh by min(rho, C), with rho of `sequence_importance` and C = `correction_threshold`.

    Source: arXiv 2510.26788, PPO-Seq-TIS and PG-Seq-TIS.
    """
    return _truncated(
        inputs, _sequence_log_ratio(inputs), constants, constants.correction_threshold
    )


def sequence_masked(inputs: PolicyInputs, constants: AlgorithmConfig) -> CorrectionTerms:
    """Weigh by rho * 1[rho <= C]: a sequence above C has no gradient; there is no lower bound.

    Some released scripts of the paper named `seq_mis` clamp at C instead: that is
    `sequence_truncated`. This is the formula of the text.

    Source: arXiv 2510.26788, PPO-Seq-MIS and PG-Seq-MIS.
    """
    return _masked(
        inputs, _sequence_log_ratio(inputs), constants, 0.0, constants.correction_threshold
    )


def token_truncated(inputs: PolicyInputs, constants: AlgorithmConfig) -> CorrectionTerms:
    """Weigh each token by min(pi(y_t) / mu(y_t), C), with C = `correction_threshold`.

    Source: arXiv 2510.26788, PPO-Token-TIS.
    """
    return _truncated(inputs, _log_ratio(inputs), constants, constants.correction_threshold)


def token_masked(inputs: PolicyInputs, constants: AlgorithmConfig) -> CorrectionTerms:
    """Weigh each token by w * 1[low <= w <= high], with w = pi(y_t) / mu(y_t).

    The bounds are `token_mask_low` and `token_mask_high`. A token inside keeps its weight w; it
    is not set to 1.

    Source: arXiv 2510.18855 (IcePop), its M(k) with alpha = 0.5 and beta = 5.
    """
    return _masked(
        inputs,
        _log_ratio(inputs),
        constants,
        constants.token_mask_low,
        constants.token_mask_high,
    )


def _log_ratio(inputs: PolicyInputs) -> Tensor:
    """Return log pi - log mu of every token, [num_seqs, num_tokens] FP64."""
    return inputs.anchor_logprobs.double() - inputs.rollout_logprobs.double()


def _sequence_log_ratio(inputs: PolicyInputs) -> Tensor:
    """Sum `_log_ratio` over each sequence, and repeat it on each of its tokens."""
    return _log_ratio(inputs).sum(dim=1, keepdim=True).expand_as(inputs.mask)


def _truncated(
    inputs: PolicyInputs, log_weight: Tensor, constants: AlgorithmConfig, high: float
) -> CorrectionTerms:
    weight = clamped_exp(log_weight, constants.log_weight_clamp).clamp(max=high)
    cut = torch.isfinite(log_weight) & (log_weight > math.log(high))
    return CorrectionTerms(weight.to(inputs.rollout_logprobs.dtype), cut)


def _masked(
    inputs: PolicyInputs,
    log_weight: Tensor,
    constants: AlgorithmConfig,
    low: float,
    high: float,
) -> CorrectionTerms:
    # Compared as logarithms, so that the clamp cannot bring a weight below its bound.
    log_low = math.log(low) if low > 0 else -math.inf
    outside = (log_weight < log_low) | (log_weight > math.log(high))
    # A log-prob that is not finite is not an outlier to be left out: its nan stays.
    cut = torch.isfinite(log_weight) & outside
    weight = clamped_exp(log_weight, constants.log_weight_clamp).masked_fill(cut, 0.0)
    return CorrectionTerms(weight.to(inputs.rollout_logprobs.dtype), cut)


CORRECTIONS: dict[Correction, Callable[[PolicyInputs, AlgorithmConfig], CorrectionTerms]] = {
    "none": no_correction,
    "token_tis": token_truncated,
    "token_mask": token_masked,
    "seq_is": sequence_importance,
    "seq_tis": sequence_truncated,
    "seq_mis": sequence_masked,
}
