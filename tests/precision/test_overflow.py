"""Causes of an overflow by hand, and calibration against synthetic thresholds."""

from __future__ import annotations

import math

import pytest

from megatron_precision.precision.loss_scale import calibrate, classify


def test_a_forward_pass_that_is_not_finite_is_an_overflow_of_activations() -> None:
    # Whatever the weights: with an inf in the forward pass they mean nothing.
    assert classify(finite_forward=False, weight_max=math.inf, headroom_bits=3) == "activations"
    assert classify(finite_forward=False, weight_max=1.0, headroom_bits=3) == "activations"


def test_a_weight_beyond_the_headroom_is_named_as_the_cause() -> None:
    assert classify(finite_forward=True, weight_max=8.5, headroom_bits=3) == "importance_weight"


def test_anything_else_is_the_gradients() -> None:
    assert classify(finite_forward=True, weight_max=8.0, headroom_bits=3) == "gradients"
    assert classify(finite_forward=True, weight_max=0.0, headroom_bits=0) == "gradients"


@pytest.mark.parametrize("largest_that_fits", [*range(41)])
def test_calibration_finds_the_exact_exponent(largest_that_fits: int) -> None:
    asked = []

    def overflows_at(scale: float) -> bool:
        asked.append(scale)
        return scale > 2.0**largest_that_fits

    assert calibrate(overflows_at, headroom_bits=0) == 2.0**largest_that_fits
    assert len(asked) <= 7
    assert all(math.log2(scale) == int(math.log2(scale)) for scale in asked)


def test_calibration_keeps_the_headroom_and_never_falls_below_one() -> None:
    assert calibrate(lambda scale: scale > 2.0**17, headroom_bits=3) == 2.0**14
    assert calibrate(lambda scale: scale > 2.0**2, headroom_bits=3) == 1.0


def test_calibration_never_goes_beyond_two_to_the_forty() -> None:
    assert calibrate(lambda scale: False, headroom_bits=0) == 2.0**40


def test_calibration_refuses_a_model_that_overflows_without_a_scale() -> None:
    with pytest.raises(FloatingPointError, match="65504"):
        calibrate(lambda scale: True, headroom_bits=3)
