"""Measures the training-inference mismatch: how far the trainer's policy is from the engine's.

mu is the rollout engine, from which the tokens were sampled; pi is the trainer, with the same
weights. With d_t = log pi(y_t) - log mu(y_t) at every response token, every statistic is a
function of the d_t and of their sums over sequences, in FP64.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class MismatchStats:
    """Statistics of one batch, over its response tokens and over its sequences.

    A sequence is one with at least one response token. Log-probs are natural logarithms.

    Attributes:
        k1_kl: mean_t(-d), an unbiased estimate of KL(mu || pi) a token; can be negative.
        k3_kl: mean_t(e^d - 1 - d), of the same KL; never negative.
        abs_diff_mean: mean_t |d|.
        abs_diff_max: max_t |d|.
        prob_diff_max: max_t |pi(y_t) - mu(y_t)|.
        seq_log_ratio_mean: mean over sequences of D = sum_t d, the log of pi/mu of a sequence.
        seq_log_ratio_std: standard deviation of D over sequences, divided by their number.
        ess: effective sample size over the number of sequences N, from 1/N to 1, with w = e^D:
            (sum w)^2 / (N sum w^2).
        ppl_ratio: mean over sequences of (perplexity under pi / perplexity under mu), where the
            perplexity of a sequence is exp(mean_t -log p). The ratio is taken for each sequence
            and then averaged, as the rollout-correction metrics of verl do; over one pool of
            tokens it would only be exp(k1_kl).
        num_tokens: response tokens.
        seq_log_ratios: D of each sequence, in the order of the batch.
    """

    k1_kl: float
    k3_kl: float
    abs_diff_mean: float
    abs_diff_max: float
    prob_diff_max: float
    seq_log_ratio_mean: float
    seq_log_ratio_std: float
    ess: float
    ppl_ratio: float
    num_tokens: int
    seq_log_ratios: list[float]

    def metrics(self) -> dict[str, float | list[float]]:
        """Return the statistics by their names in `metrics.jsonl`: `mismatch/...`."""
        return {
            f"mismatch/{field.name}": getattr(self, field.name)
            for field in dataclasses.fields(self)
        }


def mismatch_stats(
    *, old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor
) -> MismatchStats:
    """Compare the two sides' log-probs of the same sampled tokens.

    The caller sees to it that both sides had the same weights: with different versions these
    numbers are staleness, not mismatch. With several data-parallel ranks the batch is that of
    the whole job: the statistics of parts do not add up.

    Args:
        old_logprobs: the trainer's (pi), [num_seqs, num_tokens] FP32.
        rollout_logprobs: the engine's (mu), the same shape.
        mask: the same shape, bool, True at response tokens that count; what the log-probs hold
            elsewhere is not read.

    Returns:
        The statistics. With no response token all are 0, but for ess and ppl_ratio, which are 1.

    Raises:
        ValueError: shapes that differ, a mask that is not bool, or a log-prob that is not finite
            at a position that counts (both sides' offenders listed).

    Source: k1 and k3 as in Schulman, "Approximating KL divergence"; KL(mu || pi) and the
    sequence log-ratio as in arXiv 2510.26788.
    """
    _check_logprobs(old_logprobs, rollout_logprobs, mask)
    num_tokens = mask.sum(dim=1)
    if not bool(num_tokens.any()):
        return _without_tokens()
    trainer = old_logprobs.detach().to(torch.float64)
    engine = rollout_logprobs.detach().to(torch.float64)
    # Padding is replaced, not multiplied by 0: it may hold nan or -inf.
    diff = (trainer - engine).masked_fill(~mask, 0.0)
    d = diff[mask]
    prob_diff = trainer[mask].exp() - engine[mask].exp()
    not_empty = num_tokens > 0
    seq_log_ratio = diff.sum(dim=1)[not_empty]
    log_ppl_ratio = -seq_log_ratio / num_tokens[not_empty]
    return MismatchStats(
        k1_kl=float((engine - trainer)[mask].mean()),
        # expm1 keeps the digits that exp(d) - 1 loses: for d = 1e-5 the terms are 5e-11.
        k3_kl=float((torch.expm1(d) - d).mean()),
        abs_diff_mean=float(d.abs().mean()),
        abs_diff_max=float(d.abs().max()),
        prob_diff_max=float(prob_diff.abs().max()),
        seq_log_ratio_mean=float(seq_log_ratio.mean()),
        seq_log_ratio_std=float(seq_log_ratio.std(correction=0)),
        ess=_effective_sample_share(seq_log_ratio),
        ppl_ratio=float(log_ppl_ratio.exp().mean()),
        num_tokens=int(num_tokens.sum()),
        seq_log_ratios=seq_log_ratio.tolist(),
    )


def _without_tokens() -> MismatchStats:
    """Return the statistics of no tokens: policies that were never compared do not differ."""
    return MismatchStats(
        k1_kl=0.0,
        k3_kl=0.0,
        abs_diff_mean=0.0,
        abs_diff_max=0.0,
        prob_diff_max=0.0,
        seq_log_ratio_mean=0.0,
        seq_log_ratio_std=0.0,
        ess=1.0,
        ppl_ratio=1.0,
        num_tokens=0,
        seq_log_ratios=[],
    )


def _effective_sample_share(log_weight: Tensor) -> float:
    """Return (sum w)^2 / (N sum w^2) of w = exp(log_weight), [N]; a common factor cancels."""
    weight = torch.exp(log_weight - log_weight.max())
    return float(weight.sum().square() / (weight.numel() * weight.square().sum()))


def _check_logprobs(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> None:
    shapes = {
        "old_logprobs": old_logprobs.shape,
        "rollout_logprobs": rollout_logprobs.shape,
        "mask": mask.shape,
    }
    if len(set(shapes.values())) > 1 or mask.ndim != 2 or mask.dtype != torch.bool:
        got = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(
            f"mismatch_stats: got {got}, mask of {mask.dtype}; "
            "expected three of the same shape [num_seqs, num_tokens], the mask of torch.bool"
        )
    problems = []
    for name, logprobs in (("old_logprobs", old_logprobs), ("rollout_logprobs", rollout_logprobs)):
        bad = (~torch.isfinite(logprobs) & mask).nonzero().tolist()
        if bad:
            problems.append(
                f"{name}: {len(bad)} response tokens, the first at [sequence, token] {bad[0]}"
            )
    if problems:
        raise ValueError(
            "mismatch_stats: log-probs that are not finite at tokens that were sampled\n  "
            + "\n  ".join(problems)
        )
