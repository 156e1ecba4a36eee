"""Algorithms as rows of a table: a policy loss, a rollout correction and an aggregation.

A new algorithm is a row here, plus a function in `losses.py` or `correction.py` where no part
fits yet. No other module branches on an algorithm's name. This module imports no torch, so
that configs can be checked without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

PolicyLoss = Literal["ppo_clip", "policy_gradient"]
# The weight on each token's policy loss, from rollout_logprobs:
#   none          1
#   seq_is        prod_t pi_theta/mu, over the sequence, detached
Correction = Literal["none", "seq_is"]
Aggregation = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
]


@dataclass(frozen=True)
class Algorithm:
    """One row: the parts that make an algorithm.

    Attributes:
        name: as the paper's scripts spell it.
        policy_loss: the loss of one token (`losses.py`).
        correction: the weight from the rollout engine's probabilities (`correction.py`).
        aggregation: how token losses become a scalar.
        needs_old_logprobs: whether the trainer's log-probs before the update enter the loss;
            where not, the forward-only pass is left out.
        source: where the formula stands.
    """

    name: str
    policy_loss: PolicyLoss
    correction: Correction
    aggregation: Aggregation
    needs_old_logprobs: bool
    source: str


ALGORITHMS: dict[str, Algorithm] = {
    row.name: row
    for row in (
        Algorithm("PPO", "ppo_clip", "none", "seq-mean-token-sum-norm", True,
                  "arXiv 2510.26788, GRPO with asymmetric clipping"),
        Algorithm("PG-Seq-IS", "policy_gradient", "seq_is", "seq-mean-token-sum-norm", False,
                  "arXiv 2510.26788, importance-weighted policy gradient"),
    )
}  # fmt: skip
