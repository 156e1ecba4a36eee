"""Sums the token losses of a mini-batch into one number, in parts that add up.

An optimizer step sees one mini-batch, cut into micro-batches and spread over data-parallel ranks.
The divisor of its loss is computed once, from counts over the whole job, and every part is divided
by it: the sum of the parts is the mini-batch's loss, however it is cut. A mean of micro-batch means
would instead weigh a token by its neighbours.

The parts are FP32, and add up to the same loss to FP32 rounding, not bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from torch import Tensor

from megatron_precision.rl.algorithms import Aggregation


@dataclass(frozen=True)
class Normaliser:
    """The constant that divides every part of one mini-batch's loss.

    Attributes:
        mode: the aggregation it was made for.
        divisor: tokens, sequences, or tokens times sequences, after the mode; at least 1.
    """

    mode: Aggregation
    divisor: float


def normaliser(
    mode: Aggregation, *, num_sequences: int, num_tokens: int, max_response_tokens: int
) -> Normaliser:
    """Compute the divisor of a mini-batch's loss: S sequences with N_i response tokens each.

        token-mean                1/sum_i N_i  sum_i sum_t loss
        seq-mean-token-mean       1/S          sum_i 1/N_i sum_t loss
        seq-mean-token-sum        1/S          sum_i sum_t loss
        seq-mean-token-sum-norm   1/S          sum_i 1/max_response_tokens sum_t loss

    The last one keeps the mean over sequences, as the paper has it; one widespread
    implementation leaves it out.

    A sequence without a response token adds 0 and still counts in S: it is a rollout like the
    others, and S must not depend on what was sampled. With no sequence or no token at all the
    divisor is 1, and the loss is 0.

    Args:
        mode: one of `algorithms.Aggregation`.
        num_sequences: sequences of the mini-batch, over all micro-batches and ranks.
        num_tokens: response tokens that count, over all micro-batches and ranks.
        max_response_tokens: the constant of `seq-mean-token-sum-norm`, in tokens: the limit
            on a response, not the longest one sampled.

    Returns:
        The normaliser that `aggregate` takes.

    Raises:
        ValueError: an unknown mode, a negative count, or a limit below 1.

    Source: arXiv 2510.26788, sanity test, for `seq-mean-token-sum-norm`.
    """
    _check_mode(mode)
    if num_sequences < 0 or num_tokens < 0 or max_response_tokens < 1:
        raise ValueError(
            f"normaliser: got num_sequences {num_sequences}, num_tokens {num_tokens}, "
            f"max_response_tokens {max_response_tokens}; expected counts of at least 0 and a "
            "limit of at least 1"
        )
    if mode == "token-mean":
        divisor = num_tokens
    elif mode == "seq-mean-token-sum-norm":
        divisor = num_sequences * max_response_tokens
    else:
        divisor = num_sequences
    return Normaliser(mode, float(max(divisor, 1)))


def aggregate(loss: Tensor, mask: Tensor, mode: Aggregation, normaliser: Normaliser) -> Tensor:
    """Sum one micro-batch's part of the mini-batch loss.

    Args:
        loss: token losses, [num_seqs, num_tokens] FP32, with gradient.
        mask: the same shape, bool; a masked position adds exactly 0, even if its loss is nan.
        mode: one of `algorithms.Aggregation`.
        normaliser: of the mini-batch, made for the same mode.

    Returns:
        A scalar of the losses' dtype. The sum over micro-batches and data-parallel ranks is
        the mini-batch loss, so gradients are summed over them too, and nothing is averaged
        afterwards. A part without a response token is 0, with gradient 0.

    Raises:
        ValueError: an unknown mode, or a normaliser made for another one.
    """
    _check_mode(mode)
    if normaliser.mode != mode:
        raise ValueError(
            f"aggregate: the normaliser was made for {normaliser.mode}, expected {mode}"
        )
    counted = loss.masked_fill(~mask, 0.0)
    if mode == "seq-mean-token-mean":
        num_tokens = mask.sum(dim=1).clamp(min=1)
        return (counted.sum(dim=1) / num_tokens).sum() / normaliser.divisor
    return counted.sum() / normaliser.divisor


def _check_mode(mode: str) -> None:
    if mode not in get_args(Aggregation):
        raise ValueError(
            f"unknown aggregation {mode!r}: expected one of {', '.join(get_args(Aggregation))}"
        )
