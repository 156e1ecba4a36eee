"""Builds the loss function of a mini-batch; the actor calls it once per micro-batch."""

from __future__ import annotations

import torch

from megatron_precision.actor.actor import LossFunction, MicroLoss
from megatron_precision.actor.batch import Batch
from megatron_precision.config.schema import AlgorithmConfig
from megatron_precision.rl.aggregation import aggregate, normaliser
from megatron_precision.rl.algorithms import Algorithm
from megatron_precision.rl.losses import token_loss


def policy_objective(
    algorithm: Algorithm,
    constants: AlgorithmConfig,
    batch: Batch,
    rows: torch.Tensor,
    max_response_tokens: int,
    before_update: bool = False,
) -> LossFunction:
    """Build the RL loss of the mini-batch `rows`, normalised over the whole job.

    Args:
        rows: [sequences of the mini-batch] int64, row numbers in `batch`.
        max_response_tokens: the length limit; some aggregations divide by it.
        before_update: the weights are still those of the rollout, so the step's own log-probs
            serve as old ones, and those of `batch` are not read.
    """
    norm = normaliser(
        algorithm.aggregation,
        num_sequences=len(rows),
        num_tokens=int(batch.response_mask[rows].sum()),
        max_response_tokens=max_response_tokens,
    )

    def loss(part: Batch, train_logprobs: torch.Tensor, entropies: torch.Tensor) -> MicroLoss:
        mask = part.response_mask
        terms = token_loss(
            algorithm,
            constants,
            train_logprobs=train_logprobs,
            old_logprobs=train_logprobs.detach() if before_update else part.old_logprobs,
            rollout_logprobs=part.rollout_logprobs,
            advantages=part.advantages,
            mask=mask,
        )
        return MicroLoss(
            aggregate(terms.loss, mask, algorithm.aggregation, norm),
            sums={
                "tokens": float(mask.sum()),
                "sequences": float(mask.any(dim=1).sum()),
                "clipped": float(terms.clipped.sum()),
                "cut_tokens": float(terms.cut.sum()),
                "cut_sequences": float(terms.cut.any(dim=1).sum()),
                "correction": float(terms.weight.sum()),
                "entropy": float(entropies.sum()),
                "ratio": float(terms.ratio.sum()),
            },
            maxima={
                "ratio": float(terms.ratio.max()),
                "weight": float(terms.gradient_factor.max()),
            },
        )

    return loss


def supervised_objective(batch: Batch) -> LossFunction:
    """Build the warm start's loss: cross entropy per response token."""
    tokens = float(batch.response_mask.sum())

    def loss(part: Batch, train_logprobs: torch.Tensor, _entropies: torch.Tensor) -> MicroLoss:
        return MicroLoss(-train_logprobs.sum() / tokens, sums={}, maxima={})

    return loss
