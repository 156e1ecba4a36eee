"""One cell of the matrix: a trainer's dtype against an engine's, on the same sampled tokens.

d_t = log pi(y_t) - log mu(y_t), pi the trainer and mu the engine that sampled; D = sum_t d_t of a
response. What the run's own metrics have is taken from `rl/mismatch.py`; all in FP64.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from megatron_precision.mismatch.comparison import Floats, Ints, Scores

# Upper ends of the classes of mu(y_t), and of the positions in a response.
PROBABILITIES = (0.001, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)
# Upper ends of the classes of flipped layers.
FLIPS = (0, 1, 2, 4, 8, 16, 32, 64, 128)
POSITIONS = (8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768)


@dataclass(frozen=True)
class Class:
    """A class of tokens, by position, probability or router flips.

    Attributes:
        low, high: its ends, the lower one left out.
        tokens: how many.
        mean, abs_mean: of d. nan where there are none.
        k3: mean of e^d - 1 - d.
        prob_abs_mean: mean of |pi - mu|.
    """

    low: float
    high: float
    tokens: int
    mean: float
    abs_mean: float
    k3: float
    prob_abs_mean: float


@dataclass(frozen=True)
class Cell:
    """The figures of one pair of dtypes.

    Attributes:
        train, rollout: the dtypes.
        statistics: `MismatchStats` by name, without the list of sequences.
        seq_kl: mean of -D, an unbiased estimate of KL(mu || pi) of a response, in nats.
        seq_k3: mean of e^D - 1 - D, of the same.
        slope_per_1k: least squares of D on the response's length, through the origin, in nats
            per 1,000 tokens: what a longer response adds.
        slope_error: its standard error.
        equal_share: share of tokens whose log-probs are equal in FP32.
        by_position, by_probability: the classes.
        by_router_flips: by the number of layers whose router sent the predicting position to other
            experts than the engine's; none for a dense model.
        router: `RouterFlips` by name: share of (token, layer) and by layer; None where dense.
        replayed: `statistics` with the engine's experts in every router (R3); None where dense.
    """

    train: str
    rollout: str
    statistics: dict[str, float]
    seq_kl: float
    seq_k3: float
    slope_per_1k: float
    slope_error: float
    equal_share: float
    by_position: list[Class]
    by_probability: list[Class]
    by_router_flips: list[Class] = dataclasses.field(default_factory=list)
    router: dict[str, Any] | None = None
    replayed: dict[str, float] | None = None

    def as_json(self) -> dict[str, Any]:
        """Return the figures as plain values."""
        return dataclasses.asdict(self)


def cell(train: str, rollout: str, scores: Scores, rollout_logprobs: Floats, lengths: Ints) -> Cell:
    """Compare the two sides.

    Args:
        scores: the trainer's side, [N] each, response after response.
        rollout_logprobs: [N] the engine's.
        lengths: [S] tokens of each response; their sum is N.

    Raises:
        ValueError: for lengths that do not fit, and log-probs that are not finite.
    """
    train_logprobs, flips = scores.train_logprobs, scores.router_flips
    if not int(lengths.sum()) == len(train_logprobs) == len(rollout_logprobs):
        raise ValueError(
            f"{int(lengths.sum())} tokens, {len(train_logprobs)} train_logprobs and "
            f"{len(rollout_logprobs)} rollout_logprobs"
        )
    d = train_logprobs - rollout_logprobs
    ratios = sequence_log_ratios(d, lengths)
    slope, error = slope_through_origin(lengths / 1000, ratios)
    return Cell(
        train=train,
        rollout=rollout,
        statistics=_statistics(train_logprobs, rollout_logprobs, lengths),
        seq_kl=float(-ratios.mean()),
        seq_k3=float((np.expm1(ratios) - ratios).mean()),
        slope_per_1k=slope,
        slope_error=error,
        equal_share=float((d == 0).mean()),
        by_position=_classes(positions(lengths), POSITIONS, train_logprobs, rollout_logprobs),
        by_probability=_classes(
            np.exp(rollout_logprobs), PROBABILITIES, train_logprobs, rollout_logprobs
        ),
        by_router_flips=(
            []
            if flips is None
            else _classes(
                flips.astype(np.float64), FLIPS, train_logprobs, rollout_logprobs, lowest=-1.0
            )
        ),
        router=scores.facts.get("router"),
        replayed=(
            None
            if scores.replayed_logprobs is None
            else _statistics(scores.replayed_logprobs, rollout_logprobs, lengths)
        ),
    )


def sequence_log_ratios(d: Floats, lengths: Ints) -> Floats:
    """Return D of each response, [S]; 0 for an empty one."""
    ends = np.cumsum(lengths)
    sums = np.concatenate([[0.0], np.cumsum(d)])
    return sums[ends] - sums[ends - lengths]


def positions(lengths: Ints) -> Floats:
    """Return each token's place in its response, from 1, [N]."""
    return np.concatenate([np.arange(1, n + 1) for n in lengths.tolist()] or [np.zeros(0)]).astype(
        np.float64
    )


def slope_through_origin(x: Floats, y: Floats) -> tuple[float, float]:
    """Fit y on x through the origin: sum xy / sum xx, and its standard error.

    A response of no tokens has no mismatch, so that there is no intercept to fit.
    """
    square = float((x * x).sum())
    if square == 0.0:
        return float("nan"), float("nan")
    slope = float((x * y).sum()) / square
    if len(x) < 2:
        return slope, float("nan")
    residual = y - slope * x
    return slope, float(np.sqrt((residual * residual).sum() / (len(x) - 1) / square))


def _classes(
    by: Floats,
    ends: tuple[float, ...],
    train_logprobs: Floats,
    rollout_logprobs: Floats,
    lowest: float = 0.0,
) -> list[Class]:
    d = train_logprobs - rollout_logprobs
    prob = np.abs(np.exp(train_logprobs) - np.exp(rollout_logprobs))
    found, low = [], lowest
    for high in ends:
        # The last class takes what rounding put above its end.
        chosen = (by > low) & ((by <= high) if high != ends[-1] else True)
        if chosen.any():
            part = d[chosen]
            found.append(
                Class(
                    low, float(high), int(chosen.sum()), float(part.mean()),
                    float(np.abs(part).mean()), float((np.expm1(part) - part).mean()),
                    float(prob[chosen].mean()),
                )
            )  # fmt: skip
        low = float(high)
    return found


def _statistics(
    train_logprobs: Floats, rollout_logprobs: Floats, lengths: Ints
) -> dict[str, float]:
    import torch

    from megatron_precision.rl.mismatch import mismatch_stats

    mask = torch.arange(int(lengths.max(initial=0))) < torch.from_numpy(lengths)[:, None]
    sides = []
    for values in (train_logprobs, rollout_logprobs):
        padded = torch.zeros(mask.shape, dtype=torch.float64)
        padded[mask] = torch.from_numpy(values)
        sides.append(padded)
    found = mismatch_stats(old_logprobs=sides[0], rollout_logprobs=sides[1], mask=mask)
    return {k: v for k, v in dataclasses.asdict(found).items() if k != "seq_log_ratios"}
