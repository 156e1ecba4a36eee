"""Comparisons of sides, against numbers worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_precision.replay import findings
from megatron_precision.replay.findings import PointError

# Two sequences of a prompt of 1 and 2 tokens; log-probs are logs of simple probabilities.
MASK = np.array([[0, 1, 1, 1, 0], [0, 0, 1, 0, 0]], dtype=bool)
TOKENS = np.array([[7, 1, 2, 3, 0], [8, 9, 4, 0, 0]], dtype=np.int32)
LENGTHS = np.array([4, 3], dtype=np.int32)


def logs(*rows: list[float]) -> findings.Floats:
    probabilities = np.array(rows)
    return np.where(probabilities > 0, np.log(np.maximum(probabilities, 1e-9)), 0).astype("f4")


SIDES = {
    "trainer": logs([0, 0.5, 0.5, 0.2, 0], [0, 0, 0.8, 0, 0]),
    "rollout": logs([0, 0.5, 0.25, 0.4, 0], [0, 0, 0.8, 0, 0]),
    "fp32": logs([0, 0.5, 0.25, 0.4, 0], [0, 0, 0.4, 0, 0]),
}
LN2 = math.log(2)


def test_classes_of_flipped_layers_reach_beyond_every_layer() -> None:
    assert findings.flip_edges(2) == [0, 1, 2, 3]
    assert findings.flip_edges(48) == [0, 1, 2, 3, 5, 9, 17, 33, 65]


def test_a_pair_is_compared_over_its_tokens() -> None:
    pair = findings.compare("trainer", "rollout", SIDES, MASK)
    # d = 0, ln 2, -ln 2, 0
    assert (pair.tokens, pair.equal, pair.not_finite) == (4, 2, 0)
    assert pair.abs_mean == pytest.approx(LN2 / 2, rel=1e-6)
    assert pair.abs_max == pytest.approx(LN2, rel=1e-6)
    assert pair.k1 == pytest.approx(0, abs=1e-7)
    # (2 - 1 - ln 2) + (1/2 - 1 + ln 2), over four tokens
    assert pair.k3 == pytest.approx(0.5 / 4, rel=1e-6)


def test_what_is_not_finite_is_counted_and_left_out() -> None:
    broken = {**SIDES, "trainer": SIDES["trainer"].copy()}
    broken["trainer"][0, 3] = -np.inf
    pair = findings.compare("trainer", "rollout", broken, MASK)
    assert (pair.tokens, pair.not_finite) == (3, 1)
    assert pair.abs_mean == pytest.approx(LN2 / 3, rel=1e-6)
    broken["trainer"][:] = np.nan
    assert findings.compare("trainer", "rollout", broken, MASK).tokens == 0


def test_positions_count_from_the_start_of_the_response() -> None:
    assert findings.positions(MASK).tolist() == [[-1, 0, 1, 2, -1], [-1, -1, 0, -1, -1]]
    assert findings.position_edges(3) == [0, 1, 2, 3]
    assert findings.position_edges(1) == [0, 1]
    assert findings.position_edges(20) == [0, 1, 2, 4, 8, 16, 20]


def test_buckets_hold_the_mean_of_their_own_tokens() -> None:
    pairs = (("trainer", "rollout"), ("rollout", "fp32"))
    number = findings.positions(MASK)
    rows = findings.buckets(number, [0, 1, 3], SIDES, pairs, MASK)
    assert [(row.low, row.high, row.tokens) for row in rows] == [(0, 1, 2), (1, 3, 2)]
    first, second = (row.abs_mean for row in rows)
    assert first["trainer - rollout"] == 0
    assert first["rollout - fp32"] == pytest.approx(LN2 / 2, rel=1e-6)
    assert second["trainer - rollout"] == pytest.approx(LN2, rel=1e-6)


def test_the_last_edge_of_a_bucket_is_inside() -> None:
    certain = np.ones((1, 1))
    sides = {"a": np.zeros((1, 1), "f4"), "b": np.full((1, 1), -1, "f4")}
    (row,) = findings.buckets(certain, [0.5, 1.0], sides, [("a", "b")], np.ones((1, 1), bool))
    assert (row.tokens, row.abs_mean) == (1, {"a - b": 1.0})


def test_the_worst_token_comes_first_with_its_context() -> None:
    text = {0: "?", 1: "a", 2: "b", 3: "c", 4: "d", 7: "x", 8: "y", 9: "z"}
    sides = {**SIDES, "trainer": SIDES["trainer"].copy()}
    sides["trainer"][0, 3] += 0.01  # now -ln 2 + 0.01, and ln 2 is the largest
    worst = findings.worst_tokens(
        "trainer", "rollout", sides, MASK, TOKENS, LENGTHS, text, count=2, context=1
    )
    assert [(w.sequence, w.position, w.token) for w in worst] == [(0, 1, 2), (0, 2, 3)]
    assert worst[0].difference == pytest.approx(LN2, rel=1e-6)
    assert (worst[0].before, worst[0].text, worst[0].after) == ("a", "b", "c")
    assert worst[0].logprobs["fp32"] == pytest.approx(math.log(0.25), rel=1e-6)
    # The sequence ends after its last token; padding is no context.
    assert worst[1].after == ""


def test_a_token_that_is_not_finite_is_the_worst() -> None:
    sides = {**SIDES, "trainer": SIDES["trainer"].copy()}
    sides["trainer"][1, 2] = np.nan
    text = dict.fromkeys(range(10), "")
    (worst,) = findings.worst_tokens(
        "trainer", "rollout", sides, MASK, TOKENS, LENGTHS, text, count=1
    )
    assert worst.sequence == 1


def test_the_point_with_the_largest_error_of_its_own_is_named() -> None:
    points = [PointError("layer 0", 0.1, 0.2), PointError("layer 1", 0.3, 0.31)]
    assert findings.parts_first(points) == points[1]
    broken = [points[1], PointError("final norm", math.nan, math.nan), PointError("LM head", 1, 1)]
    assert findings.parts_first(broken) == broken[1]
    assert findings.parts_first([]) is None
    assert findings.parts_first([PointError("layer 0", 0.0, 0.0)]) is None
