"""Why an FP16 step overflowed, and the calibration that keeps it from overflowing at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

OverflowCause = Literal["", "activations", "gradients", "importance_weight"]

# Beyond this the FP32 loss itself could leave its range when scaled.
LARGEST_EXPONENT = 40


def classify(*, finite_forward: bool, weight_max: float, headroom_bits: int) -> OverflowCause:
    """Name what made a step overflow.

        activations         the forward pass was not finite;
        importance_weight   a token's weight alone exceeds the headroom that the scale keeps over
                            a mini-batch of ordinary weights;
        gradients           neither: the gradients themselves outgrew the scale.

    Args:
        finite_forward: whether every loss and log-prob was finite.
        weight_max: largest factor on a token's policy-gradient term (ratio times correction).
        headroom_bits: powers of two between the scale and the first overflow at calibration.
    """
    if not finite_forward:
        return "activations"
    return "importance_weight" if weight_max > 2.0**headroom_bits else "gradients"


def calibrate(overflows_at: Callable[[float], bool], headroom_bits: int) -> float:
    """The largest power of two at which nothing overflows, less the headroom.

    Overflow is monotone in the scale, so the exponent is bisected: six passes.

    Args:
        overflows_at: runs the first mini-batch's backward pass at a scale; agreed by all ranks.

    Raises:
        FloatingPointError: where even scale 1 overflows: the model does not fit FP16's range.
    """
    if overflows_at(1.0):
        raise FloatingPointError(
            "the first mini-batch overflows FP16 without any loss scale: its activations or "
            "importance weights leave the range (65504); see precision/act_max_trainer"
        )
    fits, overflows = 0, LARGEST_EXPONENT + 1
    while overflows - fits > 1:
        middle = (fits + overflows) // 2
        if overflows_at(2.0**middle):
            overflows = middle
        else:
            fits = middle
    return 2.0 ** max(0, fits - headroom_bits)
