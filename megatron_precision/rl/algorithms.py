"""Algorithms as rows of a table, each composed of parts that do not know of one another.

    reward shaping -> advantage -> policy loss x rollout correction -> aggregation

A new algorithm is a row here, plus a function beside it where no part fits yet. No other module
branches on an algorithm's name. This module imports no torch, so that configs can be checked
without it. docs/algorithms.md has the formulas side by side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# What is added to a rollout's reward (`reward_shaping.py`).
RewardShaping = Literal["none", "overlong"]
# How a reward compares with its group's (`advantages.py`).
Advantage = Literal["group_mean", "group_mean_std"]
# The loss of one token (`losses.py`).
PolicyLoss = Literal["ppo_clip", "gspo_clip", "policy_gradient"]
# The weight on each token's policy loss, from rollout_logprobs mu (`correction.py`):
#   none          1
#   token_tis     w = pi/mu of the token, truncated at C
#   token_mask    w, or 0 outside of two bounds
#   seq_is        rho = prod_t pi/mu over the sequence
#   seq_tis       rho, truncated at C
#   seq_mis       rho, or 0 above C
Correction = Literal["none", "token_tis", "token_mask", "seq_is", "seq_tis", "seq_mis"]
# How token losses become a scalar (`aggregation.py`).
Aggregation = Literal[
    "token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"
]

# Policy losses with a ratio to the policy before the update.
RATIO_TO_OLD: frozenset[PolicyLoss] = frozenset({"ppo_clip", "gspo_clip"})


@dataclass(frozen=True)
class Algorithm:
    """One row: the parts that make an algorithm.

    Attributes:
        name: as the paper's scripts spell it.
        policy_loss: the loss of one token.
        correction: the weight from the rollout engine's probabilities.
        aggregation: how token losses become a scalar.
        source: where the formula stands.
        advantage: how a reward compares with those of its group.
        reward_shaping: what is added to the task's reward before that.
        dynamic_sampling: whether groups whose rewards are all equal, which carry no gradient,
            are replaced by groups of further prompts.
    """

    name: str
    policy_loss: PolicyLoss
    correction: Correction
    aggregation: Aggregation
    source: str
    advantage: Advantage = "group_mean"
    reward_shaping: RewardShaping = "none"
    dynamic_sampling: bool = False

    @property
    def needs_old_logprobs(self) -> bool:
        """Whether pi_old enters the loss; where not, the forward-only pass is left out."""
        return self.policy_loss in RATIO_TO_OLD


_PAPER = "arXiv 2510.26788"
_NORM: Aggregation = "seq-mean-token-sum-norm"

ALGORITHMS: dict[str, Algorithm] = {
    row.name: row
    for row in (
        Algorithm("PPO", "ppo_clip", "none", _NORM,
                  f"{_PAPER}, GRPO with asymmetric clipping"),
        Algorithm("PPO-Token-TIS", "ppo_clip", "token_tis", _NORM, f"{_PAPER}, GRPO-Token-TIS"),
        Algorithm("PPO-Seq-TIS", "ppo_clip", "seq_tis", _NORM, f"{_PAPER}, GRPO-Seq-TIS"),
        Algorithm("PPO-Seq-MIS", "ppo_clip", "seq_mis", _NORM, f"{_PAPER}, GRPO-Seq-MIS"),
        Algorithm("PPO-Token-IcePop", "ppo_clip", "token_mask", _NORM,
                  "arXiv 2510.18855, IcePop's mask on the PPO of this table"),
        Algorithm("PG-Seq-IS", "policy_gradient", "seq_is", _NORM,
                  f"{_PAPER}, importance-weighted policy gradient"),
        Algorithm("PG-Seq-TIS", "policy_gradient", "seq_tis", _NORM, f"{_PAPER}, PG-Seq-TIS"),
        Algorithm("PG-Seq-MIS", "policy_gradient", "seq_mis", _NORM, f"{_PAPER}, PG-Seq-MIS"),
        Algorithm("Vanilla-GSPO", "gspo_clip", "none", "seq-mean-token-mean",
                  f"arXiv 2507.18071, as {_PAPER} runs it"),
        Algorithm("DAPO", "ppo_clip", "none", "token-mean", "arXiv 2503.14476",
                  advantage="group_mean_std", reward_shaping="overlong", dynamic_sampling=True),
    )
}  # fmt: skip
