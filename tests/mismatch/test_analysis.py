"""A cell of the matrix against numbers worked by hand, in FP64."""

from __future__ import annotations

import math

import numpy as np
import pytest

from megatron_precision.mismatch.analysis import (
    cell,
    positions,
    sequence_log_ratios,
    slope_through_origin,
)
from megatron_precision.mismatch.comparison import Scores

# Two responses, of three tokens and of one, and an empty one between them.
LENGTHS = np.array([3, 0, 1])
MU = np.log(np.array([0.5, 0.25, 0.8, 0.004]))
PI = np.log(np.array([0.4, 0.25, 1.0, 0.008]))


def test_a_response_sums_its_own_tokens_and_an_empty_one_has_none() -> None:
    found = sequence_log_ratios(PI - MU, LENGTHS)
    # ln(0.4 / 0.5) + 0 + ln(1 / 0.8) = ln 1 = 0
    np.testing.assert_allclose(found, [0.0, 0.0, math.log(2)], atol=1e-15)
    assert positions(LENGTHS).tolist() == [1, 2, 3, 1]


def test_a_cell_is_worked_by_hand() -> None:
    found = cell("bf16", "fp16", Scores(PI, {}), MU, LENGTHS)
    d = [math.log(0.8), 0.0, math.log(1.25), math.log(2)]
    # e^d - 1 - d: 0.8 - 1 + ln 1.25, 0, 1.25 - 1 - ln 1.25, 2 - 1 - ln 2
    k3 = (-0.2 + math.log(1.25) + 0.25 - math.log(1.25) + 1 - math.log(2)) / 4
    assert found.statistics["k3_kl"] == pytest.approx(k3)
    assert found.statistics["abs_diff_mean"] == pytest.approx(sum(map(abs, d)) / 4)
    assert found.statistics["num_tokens"] == 4
    assert found.seq_kl == pytest.approx(-math.log(2) / 3)
    assert found.seq_k3 == pytest.approx((2 - 1 - math.log(2)) / 3)
    assert found.equal_share == 0.25
    # sum xy / sum xx in thousands of tokens: 0.001 ln 2 / (0.003^2 + 0.001^2)
    assert found.slope_per_1k == pytest.approx(0.001 * math.log(2) / 1e-5)


def test_classes_hold_every_token_once() -> None:
    found = cell("bf16", "bf16", Scores(PI, {}), MU, LENGTHS)
    assert sum(c.tokens for c in found.by_probability) == 4
    assert sum(c.tokens for c in found.by_position) == 4
    # 0.004; 0.25 and 0.5 (an upper end belongs to its class); 0.8
    assert [(c.high, c.tokens) for c in found.by_probability] == [(0.01, 1), (0.5, 2), (0.9, 1)]
    rare = found.by_probability[0]
    assert rare.mean == pytest.approx(math.log(2))
    assert rare.prob_abs_mean == pytest.approx(0.004)
    # What rounding puts above probability one is in the last class.
    above = cell("bf16", "bf16", Scores(np.array([0.0]), {}), np.array([1e-7]), np.array([1]))
    assert [c.high for c in above.by_probability] == [1.0]


def test_tokens_are_classed_by_the_layers_that_route_them_otherwise() -> None:
    router = {"flip_share": 0.25, "by_layer": [0.5, 0.0]}
    scores = Scores(PI, {"router": router}, np.array([0, 0, 3, 4]), MU)
    found = cell("bf16", "bf16", scores, MU, LENGTHS)
    # ln 0.8 and 0; ln 1.25 and ln 2, of 3 and of 4 layers: one class
    assert [(c.high, c.tokens) for c in found.by_router_flips] == [(0, 2), (4, 2)]
    means = [c.abs_mean for c in found.by_router_flips]
    assert means == pytest.approx([math.log(1.25) / 2, (math.log(1.25) + math.log(2)) / 2])
    assert found.router == router
    # Replayed, both sides are equal here; the cell's own statistics are not of the replay.
    assert found.replayed is not None
    assert found.replayed["abs_diff_mean"] == 0.0
    assert found.statistics["abs_diff_mean"] > 0.0


def test_a_dense_model_has_no_routing() -> None:
    found = cell("bf16", "bf16", Scores(PI, {}), MU, LENGTHS)
    assert (found.by_router_flips, found.router, found.replayed) == ([], None, None)


def test_a_slope_has_the_error_of_a_line_through_the_origin() -> None:
    # y = 2x + noise of ±1 at x = 1 and x = 2: slope (3 + 2·3) / 5, residuals 1.2 and -0.6
    slope, error = slope_through_origin(np.array([1.0, 2.0]), np.array([3.0, 3.0]))
    assert slope == pytest.approx(9 / 5)
    assert error == pytest.approx(math.sqrt((1.2**2 + 0.6**2) / 1 / 5))
    assert math.isnan(slope_through_origin(np.zeros(2), np.ones(2))[0])


@pytest.mark.parametrize("lengths", [[3, 0, 2], [3]])
def test_lengths_that_do_not_fit_the_tokens_are_refused(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match="tokens"):
        cell("bf16", "bf16", Scores(PI, {}), MU, np.array(lengths))


def test_a_log_prob_that_is_not_finite_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        cell("bf16", "bf16", Scores(np.array([np.nan]), {}), np.array([-1.0]), np.array([1]))
