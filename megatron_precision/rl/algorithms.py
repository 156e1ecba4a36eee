"""Algorithms as rows of a table, each composed of parts that do not know of one another.

    reward shaping -> advantage -> policy loss x rollout correction -> aggregation

A new algorithm is a row here, plus a function beside it where no part fits yet. A user's own is
the same in a file outside the package, named `FILE.py:ROW`: there a part is the function itself.
No other module branches on an algorithm's name. This module imports no torch, so that configs can
be checked without it. docs/algorithms.md has the formulas side by side.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from megatron_precision.config import user_files
from megatron_precision.config.errors import Problem, UserError, unknown_name

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
# A part of a user's own, with the arguments of the functions in the module of its kind.
Function = Callable[..., Any]


@dataclass(frozen=True)
class Algorithm:
    """A row of the table: the parts that make an algorithm.

    In a user's file `policy_loss`, `correction`, `advantage` and `reward_shaping` may be
    functions; here they are names.

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
        reads_old_logprobs: whether a function of the row's own reads pi_old; the named policy
            losses with a ratio to it need not say so.
    """

    name: str
    policy_loss: PolicyLoss | Function
    correction: Correction | Function
    aggregation: Aggregation
    source: str
    advantage: Advantage | Function = "group_mean"
    reward_shaping: RewardShaping | Function = "none"
    dynamic_sampling: bool = False
    reads_old_logprobs: bool = False

    @property
    def needs_old_logprobs(self) -> bool:
        """True if pi_old enters the loss; otherwise no pass for it is run."""
        return self.reads_old_logprobs or self.policy_loss in RATIO_TO_OLD


Part = TypeVar("Part", bound=str)


def function_of(part: Part | Function, table: Mapping[Part, Function]) -> Function:
    """Return the function that a part of a row means: its own, or the table's of that name."""
    return part if callable(part) else table[part]


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


def algorithm(name: str, option: str = "algo.name") -> Algorithm:
    """Return the row that a name means.

    Args:
        name: a key of `ALGORITHMS`, or `FILE.py:ROW`.
        option: the setting that has the name, for messages.

    Raises:
        UserError: there is no such row, its file cannot be loaded, or a part of it is unknown.
    """
    if not user_files.is_reference(name):
        if name not in ALGORITHMS:
            raise UserError(unknown_algorithm(option, name))
        return ALGORITHMS[name]
    row = user_files.load(name, option, "an Algorithm(...)")
    where = user_files.place(row, name, option)
    if not isinstance(row, Algorithm):
        raise UserError(
            Problem(
                "not an algorithm", where, repr(row), "an Algorithm of megatron_precision.rl",
                "name a row of the file",
            )
        )  # fmt: skip
    found = [problem for problem in _part_problems(row, where) if problem is not None]
    if found:
        raise UserError(found)
    return row


def unknown_algorithm(option: str, got: str) -> Problem:
    """Return the problem of a name without a row; by the papers' names GRPO is PPO here."""
    problem = unknown_name("algorithm", option, got, list(ALGORITHMS))
    expected = f"{problem.expected}; or FILE.py:ROW of your own"
    ours = got.upper().replace("GRPO", "PPO", 1)
    named = [name for name in ALGORITHMS if name.upper() == ours]
    remedy = f"it is {named[0]} here" if named else problem.remedy
    return dataclasses.replace(problem, expected=expected, remedy=remedy)


def _part_problems(row: Algorithm, where: str) -> list[Problem | None]:
    kinds = {
        "policy_loss": PolicyLoss, "correction": Correction, "advantage": Advantage,
        "reward_shaping": RewardShaping, "aggregation": Aggregation,
    }  # fmt: skip

    def problem(field: str, kind: Any) -> Problem | None:
        part = getattr(row, field)
        if part in get_args(kind) or (callable(part) and field != "aggregation"):
            return None
        found = unknown_name(field, f"{where}, {field}", str(part), get_args(kind))
        ours = "" if field == "aggregation" else "; or a function"
        return dataclasses.replace(found, expected=found.expected + ours)

    return [problem(field, kind) for field, kind in kinds.items()]
