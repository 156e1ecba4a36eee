"""The rule that dumps an iteration by itself, on series worked by hand."""

from __future__ import annotations

import math

from megatron_precision.train.dumps import MIN_HISTORY, WINDOW, JumpWatch


def seen(values: list[float], factor: float = 5.0) -> list[str]:
    watch = JumpWatch("loss/grad_norm", factor)
    return [watch.see(value) for value in values]


def test_a_value_above_five_medians_jumps_and_one_at_five_does_not() -> None:
    # The medians of 1 2 3 4 is 2.5, and of 1 2 3 4 12.5 it is 3.
    assert seen([1, 2, 3, 4, 12.5, 15]) == [""] * 6
    assert seen([1, 2, 3, 4, 12.6]) == [
        *[""] * 4,
        "loss/grad_norm 12.6 is above 5 × its median 2.5",
    ]


def test_the_factor_is_the_users() -> None:
    assert seen([1, 1, 1, 1, 2.1], factor=2.0)[-1] == "loss/grad_norm 2.1 is above 2 × its median 1"


def test_nothing_jumps_before_the_history_is_known() -> None:
    assert seen([1, 1, 1, 100])[-1] == ""
    assert MIN_HISTORY == 4


def test_a_new_level_is_a_jump_for_half_a_window() -> None:
    jumps = seen([1.0] * WINDOW + [10.0] * WINDOW)
    # With 10 tens among 20 the median is 5.5, and 10 is no longer above 27.5.
    assert [bool(jump) for jump in jumps] == [False] * 20 + [True] * 10 + [False] * 10


def test_what_is_not_finite_jumps_at_once_and_leaves_no_trace() -> None:
    assert seen([math.nan, 1, math.inf]) == ["loss/grad_norm is nan", "", "loss/grad_norm is inf"]
    assert seen([math.nan, math.inf, math.nan, math.inf, 1, 100])[-1] == ""


def test_a_median_of_zero_gives_no_scale() -> None:
    assert seen([0, 0, 0, 0, 1e-3])[-1] == ""


def test_a_factor_of_zero_is_never() -> None:
    assert seen([1, 1, 1, 1, 1e9, math.nan], factor=0.0) == [""] * 6
