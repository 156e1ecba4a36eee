"""Computes the loss of each token: a policy loss times the weight of a rollout correction.

Shapes: [num_seqs, num_tokens], right-padded response tokens; advantages [num_seqs]. Losses are
signed to be minimised; `aggregation.py` sums them.

A new policy loss is a function here and an entry in `POLICY_LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_precision.config.schema import AlgorithmConfig
from megatron_precision.rl.algorithms import Algorithm, PolicyLoss, function_of
from megatron_precision.rl.correction import CORRECTIONS, PolicyInputs, clamped_exp


@dataclass(frozen=True)
class PolicyTerms:
    """The result of a policy loss, before correction and mask; [num_seqs, num_tokens] each.

    Attributes:
        loss: with gradient.
        clipped: bool, True where the clipped branch is the larger one.
        ratio: pi_theta over the policy that the loss compares it with.
        gradient_factor: the magnitude of d loss / d train_logprobs over that of A, unclipped.
    """

    loss: Tensor
    clipped: Tensor
    ratio: Tensor
    gradient_factor: Tensor


@dataclass(frozen=True)
class TokenLoss:
    """The token losses of a micro-batch; [num_seqs, num_tokens] each.

    All are 0 (False) where the mask is False, so that a sum needs only the token count.

    Attributes:
        loss: weight times policy loss, with gradient, to be given to `aggregation.aggregate`.
        weight: the correction's weight, detached.
        cut: bool, tokens whose weight the correction truncated or set to 0.
        clipped: bool, tokens whose clipped branch is in force.
        ratio: detached; pi_theta/pi_old where the policy loss has an old policy (of the
            sequence, for GSPO), and pi_theta/mu where not.
        gradient_factor: detached; what the advantage is multiplied with in the gradient of an
            unclipped token, correction included: a large one can overflow FP16.
    """

    loss: Tensor
    weight: Tensor
    cut: Tensor
    clipped: Tensor
    ratio: Tensor
    gradient_factor: Tensor


def ppo_clip(inputs: PolicyInputs, constants: AlgorithmConfig) -> PolicyTerms:
    """Compute PPO's clipped surrogate, with separate lower and upper bounds.

        r    = pi_theta / pi_old
        loss = max(-r A, -clip(r, 1 - clip_low, 1 + clip_high) A)
        and, where A < 0 and dual_clip is not 0, at most -dual_clip A

    At r = 1 its gradient is that of `policy_gradient`.

    Source: arXiv 1707.06347, equation 7; clip_low and clip_high apart as in arXiv 2503.14476;
    dual_clip from arXiv 1912.09729.
    """
    if inputs.old_logprobs is None:
        raise ValueError("policy loss ppo_clip: got no old_logprobs")
    log_ratio = inputs.train_logprobs - inputs.old_logprobs
    ratio = clamped_exp(log_ratio, constants.log_weight_clamp)
    bounded = ratio.clamp(1.0 - constants.clip_low, 1.0 + constants.clip_high)
    unclipped_loss = -ratio * inputs.advantages
    clipped_loss = -bounded * inputs.advantages
    loss = torch.maximum(unclipped_loss, clipped_loss)
    clipped = clipped_loss > unclipped_loss
    if constants.dual_clip > 0:
        ceiling = (-constants.dual_clip * inputs.advantages).expand_as(loss)
        above = (inputs.advantages < 0) & (loss > ceiling)
        loss, clipped = torch.where(above, ceiling, loss), clipped | above
    return PolicyTerms(loss, clipped, ratio, gradient_factor=ratio)


def gspo_clip(inputs: PolicyInputs, constants: AlgorithmConfig) -> PolicyTerms:
    """Compute GSPO: one ratio per sequence, its tokens' geometric mean, clipped as in PPO.

        s    = exp(mean_t log(pi_theta/pi_old)), the same on every token of a sequence
        s_t  = sg(s) pi_theta / sg(pi_theta), equal to s, with the gradient of its own token
        loss = max(-s_t A, -clip(s_t, 1 - sequence_clip_low, 1 + sequence_clip_high) A)

    Under `seq-mean-token-mean` the gradient is that of the sequence's own loss: each of its N
    tokens has s A / N. The mean is over response tokens, in FP64.

    Source: arXiv 2507.18071, GSPO-token, which for one advantage a sequence is GSPO; bounds as
    in arXiv 2510.26788, Vanilla-GSPO. mu is not read.
    """
    if inputs.old_logprobs is None:
        raise ValueError("policy loss gspo_clip: got no old_logprobs")
    train = inputs.train_logprobs
    log_ratio = train.detach().double() - inputs.old_logprobs.double()
    num_tokens = inputs.mask.sum(dim=1, keepdim=True).clamp(min=1)
    log_sequence_ratio = (log_ratio.sum(dim=1, keepdim=True) / num_tokens).to(train.dtype)
    # train - train.detach() is 0 with gradient 1; it is nan where train is not finite.
    ratio = clamped_exp(log_sequence_ratio + (train - train.detach()), constants.log_weight_clamp)
    bounded = ratio.clamp(1.0 - constants.sequence_clip_low, 1.0 + constants.sequence_clip_high)
    unclipped_loss = -ratio * inputs.advantages
    clipped_loss = -bounded * inputs.advantages
    return PolicyTerms(
        loss=torch.maximum(unclipped_loss, clipped_loss),
        clipped=clipped_loss > unclipped_loss,
        ratio=ratio,
        gradient_factor=ratio,
    )


def policy_gradient(inputs: PolicyInputs, constants: AlgorithmConfig) -> PolicyTerms:
    """Compute the score function, -A log pi_theta. Never clipped; its ratio is pi_theta/mu.

    Source: arXiv 2510.26788, the policy loss of PG-Seq-IS, PG-Seq-TIS and PG-Seq-MIS.
    """
    log_ratio = inputs.train_logprobs.detach() - inputs.rollout_logprobs
    return PolicyTerms(
        loss=-inputs.advantages * inputs.train_logprobs,
        clipped=torch.zeros_like(inputs.mask),
        ratio=clamped_exp(log_ratio, constants.log_weight_clamp),
        gradient_factor=torch.ones_like(log_ratio),
    )


POLICY_LOSSES: dict[PolicyLoss, Callable[[PolicyInputs, AlgorithmConfig], PolicyTerms]] = {
    "ppo_clip": ppo_clip,
    "gspo_clip": gspo_clip,
    "policy_gradient": policy_gradient,
}


def token_loss(
    algorithm: Algorithm,
    constants: AlgorithmConfig,
    *,
    train_logprobs: Tensor,
    old_logprobs: Tensor | None,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
) -> TokenLoss:
    """Compute the loss of every token of a micro-batch, by the algorithm's parts.

    A masked position contributes exactly 0 to the loss and to every gradient, whatever its
    log-probs are (nan and -inf included). A log-prob that is not finite at a position that
    counts makes that token's loss non-finite; it is never clamped into an ordinary number.

    Args:
        algorithm: a row of `rl/algorithms.py`.
        constants: bounds and thresholds of the parts.
        train_logprobs: pi_theta, [num_seqs, num_tokens] FP32, with gradient.
        old_logprobs: pi_old, the same shape, constant; read only where the algorithm needs it.
        rollout_logprobs: mu, the same shape, constant.
        advantages: [num_seqs] FP32, constant.
        mask: [num_seqs, num_tokens] bool, True at response tokens that count.

    Returns:
        Token losses and what the metrics need.

    Raises:
        ValueError: old_logprobs missing where the algorithm needs them, or shapes and dtypes
            that do not fit, all listed.

    Source: arXiv 2510.26788.
    """
    if algorithm.needs_old_logprobs and old_logprobs is None:
        raise ValueError(
            f"algorithm {algorithm.name}: old_logprobs are missing; its loss compares the policy "
            "with the one before the update, so run the trainer's forward-only pass first"
        )
    _check_shapes(train_logprobs, old_logprobs, rollout_logprobs, advantages, mask)
    # Zeros go in before any arithmetic: the gradient of 0 * nan is nan, that of a constant is 0.
    inputs = PolicyInputs(
        train_logprobs=train_logprobs.masked_fill(~mask, 0.0),
        old_logprobs=(
            old_logprobs.detach().masked_fill(~mask, 0.0)
            if algorithm.needs_old_logprobs and old_logprobs is not None
            else None
        ),
        rollout_logprobs=rollout_logprobs.detach().masked_fill(~mask, 0.0),
        advantages=advantages.detach()[:, None],
        mask=mask,
    )
    terms = function_of(algorithm.policy_loss, POLICY_LOSSES)(inputs, constants)
    correction = function_of(algorithm.correction, CORRECTIONS)(inputs, constants)
    weight = correction.weight.detach()
    return TokenLoss(
        loss=(weight * terms.loss).masked_fill(~mask, 0.0),
        weight=weight.masked_fill(~mask, 0.0),
        cut=correction.cut & mask,
        clipped=terms.clipped & mask,
        ratio=terms.ratio.detach().masked_fill(~mask, 0.0),
        gradient_factor=(weight * terms.gradient_factor.detach()).masked_fill(~mask, 0.0),
    )


def _check_shapes(
    train_logprobs: Tensor,
    old_logprobs: Tensor | None,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
) -> None:
    """Check every shape: a wrong one would broadcast into a plausible loss."""
    shape, dtype = train_logprobs.shape, train_logprobs.dtype
    if train_logprobs.ndim != 2 or dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"train_logprobs: got shape {list(shape)} of {dtype}, "
            "expected [num_seqs, num_tokens] of torch.float32"
        )
    expected: dict[str, tuple[Tensor, torch.Size, torch.dtype]] = {
        "rollout_logprobs": (rollout_logprobs, shape, dtype),
        "advantages": (advantages, shape[:1], dtype),
        "mask": (mask, shape, torch.bool),
    }
    if old_logprobs is not None:
        expected["old_logprobs"] = (old_logprobs, shape, dtype)
    problems = [
        f"{name}: got shape {list(tensor.shape)} of {tensor.dtype}, "
        f"expected {list(want_shape)} of {want_dtype}"
        for name, (tensor, want_shape, want_dtype) in expected.items()
        if tensor.shape != want_shape or tensor.dtype != want_dtype
    ]
    if problems:
        raise ValueError(
            f"token_loss: inputs do not fit train_logprobs {list(shape)} of {dtype}\n  "
            + "\n  ".join(problems)
        )
