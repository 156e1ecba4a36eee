"""Measures where two sides' log-probs differ: by token, position, probability and layer, in NumPy.

Log-probs are natural logarithms; a side is one of

    rollout   the engine, when it sampled
    trainer   before the update, in the run
    replay    the trainer again, in the dtype and layout of the replay
    fp32      the trainer's own code in FP32, on the same weights

and d = log p_a(y_t) - log p_b(y_t) at response tokens that both scored.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from megatron_precision.config.schema import ParallelConfig

Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]

EMBEDDING, FINAL_NORM, LM_HEAD = "embedding", "final norm", "LM head"
PROBABILITY_EDGES = (0.0, 0.01, 0.1, 0.5, 0.9, 0.99, 1.0)


def layer_name(number: int) -> str:
    """Name a layer, counted from 0 as in the names of a checkpoint's tensors."""
    return f"layer {number}"


@dataclass(frozen=True)
class PointError:
    """The distance of the activations at one point from the reference's.

    Attributes:
        name: `embedding`, `layer 0`, ..., `final norm`, `LM head`.
        mean, largest: over tokens, of ||x - r|| / ||r||.
        router_mean: the same mean for the logits of the layer's router; None without one.
        flipped_share: of tokens that the router sends to another set of experts.
    """

    name: str
    mean: float
    largest: float
    router_mean: float | None = None
    flipped_share: float | None = None


@dataclass(frozen=True)
class Scored:
    """The results of the forward passes, equal on every rank.

    Attributes:
        replay: [S, L] FP32 log-probs in the dtype and layout of the replay.
        fp32: [S, L] FP32, of the reference; the replay's own where that is FP32.
        free, forced: errors of the activations by point (`probe.py`); empty for an FP32 replay.
        engine_flips: by layer, the share of tokens that the replay's router sends to other
            experts than the engine's did; None where the engine's are not known.
        flipped_layers: [S, L] int32, in how many layers a token is one of them.
    """

    replay: Floats
    fp32: Floats
    free: list[PointError]
    forced: list[PointError]
    engine_flips: list[float] | None = None
    flipped_layers: NDArray[np.int32] | None = None


@dataclass(frozen=True)
class Pair:
    """Two sides' log-probs, compared over the tokens that both scored.

    Attributes:
        a, b: names of the sides; d = a - b.
        tokens: compared.
        not_finite: tokens left out because a side is inf or nan there.
        equal: tokens with the same bits.
        abs_mean, abs_max: of |d|, nats.
        k1: mean(-d). With a the trainer and b the engine, an estimate of KL(rollout || trainer).
        k3: mean(e^d - 1 - d).
    """

    a: str
    b: str
    tokens: int
    not_finite: int
    equal: int
    abs_mean: float
    abs_max: float
    k1: float
    k3: float


def compare(a: str, b: str, sides: Mapping[str, Floats], known: Bools) -> Pair:
    """Compare two sides.

    Args:
        sides: [S, L] FP32 each, by name.
        known: [S, L] bool, the tokens that both sides scored.
    """
    x, y = sides[a][known].astype(np.float64), sides[b][known].astype(np.float64)
    finite = np.isfinite(x) & np.isfinite(y)
    d = x[finite] - y[finite]
    if not d.size:
        return Pair(a, b, 0, int(known.sum()), 0, 0.0, 0.0, 0.0, 0.0)
    return Pair(
        a=a,
        b=b,
        tokens=int(d.size),
        not_finite=int((~finite).sum()),
        equal=int((d == 0).sum()),
        abs_mean=float(np.abs(d).mean()),
        abs_max=float(np.abs(d).max()),
        k1=float(-d.mean()),
        # expm1 keeps the digits that exp(d) - 1 loses.
        k3=float((np.expm1(d) - d).mean()),
    )


@dataclass(frozen=True)
class Bucket:
    """Mean |d| of some tokens.

    Attributes:
        low, high: the tokens' position in the response, or probability; low <= value < high.
        tokens: how many.
        abs_mean: by the pair's name, `a - b`.
    """

    low: float
    high: float
    tokens: int
    abs_mean: dict[str, float]


def buckets(
    values: NDArray[np.float64],
    edges: Sequence[float],
    sides: Mapping[str, Floats],
    pairs: Sequence[tuple[str, str]],
    known: Bools,
) -> list[Bucket]:
    """Average |d| of each pair, for tokens with values between neighbouring edges.

    Args:
        values: [S, L]; the last edge is inclusive.
        known: [S, L] bool, the tokens that count.
    """
    found = []
    for low, high in pairwise(edges):
        below = values <= high if high == edges[-1] else values < high
        chosen = known & (values >= low) & below
        for a, b in pairs:
            chosen = chosen & np.isfinite(sides[a]) & np.isfinite(sides[b])
        if chosen.any():
            means = {
                f"{a} - {b}": float(
                    np.abs(sides[a][chosen].astype(np.float64) - sides[b][chosen]).mean()
                )
                for a, b in pairs
            }
            found.append(Bucket(low, high, int(chosen.sum()), means))
    return found


def positions(response_mask: Bools) -> NDArray[np.float64]:
    """Number the tokens within their responses from 0, [S, L]; -1 outside."""
    number = np.cumsum(response_mask, axis=1) - 1
    return np.where(response_mask, number, -1).astype(np.float64)


def position_edges(longest: int) -> list[float]:
    """Return 0, 1, 2, 4, 8, ... up to the longest response."""
    edges = [0.0, 1.0]
    while edges[-1] < longest:
        edges.append(min(2 * edges[-1], float(longest)))
    return edges


def flip_edges(layers: int) -> list[float]:
    """Return 0, 1, 2, 3, 5, 9, ... beyond the number of layers: classes of flipped layers."""
    edges = [0.0, 1.0]
    while edges[-1] <= layers:
        edges.append(2.0 if edges[-1] == 1 else 2 * edges[-1] - 1)
    return edges


@dataclass(frozen=True)
class WorstToken:
    """A token at which two sides differ much.

    Attributes:
        sequence: its row in the batch.
        position: its number within the response.
        token: its id.
        difference: d.
        logprobs: of every side that scored it.
        before, text, after: the token in its context.
    """

    sequence: int
    position: int
    token: int
    difference: float
    logprobs: dict[str, float]
    before: str
    text: str
    after: str


def worst_tokens(
    a: str,
    b: str,
    sides: Mapping[str, Floats],
    known: Bools,
    tokens: NDArray[np.int32],
    lengths: NDArray[np.int32],
    text_of: Mapping[int, str],
    count: int = 10,
    context: int = 12,
) -> list[WorstToken]:
    """List the tokens of the largest |d| with their contexts, non-finite ones first."""
    where = np.argwhere(known)
    d = sides[a][known].astype(np.float64) - sides[b][known]
    size = np.where(np.isfinite(d), np.abs(d), math.inf)
    found = []
    number = positions(known)
    for at in np.argsort(-size, kind="stable")[:count]:
        row, column = (int(i) for i in where[at])
        words = [text_of[int(token)] for token in tokens[row, : lengths[row]]]
        found.append(
            WorstToken(
                sequence=row,
                position=int(number[row, column]),
                token=int(tokens[row, column]),
                difference=float(d[at]),
                logprobs={name: float(values[row, column]) for name, values in sides.items()},
                before="".join(words[max(0, column - context) : column]),
                text=words[column],
                after="".join(words[column + 1 : column + 1 + context]),
            )
        )
    return found


def parts_first(own: Sequence[PointError]) -> PointError | None:
    """Find the point that adds the largest error, given the reference's input.

    The first that is not finite, or else the largest mean; None where nothing differs.
    """
    for point in own:
        if not math.isfinite(point.mean):
            return point
    largest = max(own, key=lambda point: point.mean, default=None)
    return largest if largest is not None and largest.mean > 0 else None


def layout_words(parallel: ParallelConfig) -> str:
    """Format a layout as `--layout` takes it, without sizes of 1."""
    sizes = {
        "tp": parallel.tp_size, "pp": parallel.pp_size, "ep": parallel.ep_size,
        "etp": parallel.etp_size, "dp": parallel.dp_size, "sp": int(parallel.sequence_parallel),
    }  # fmt: skip
    words = [f"{name}={size}" for name, size in sizes.items() if size > (name != "sp")]
    return ",".join(words or ["tp=1"])
