"""Gives the whole chain of optimizers one dynamic loss scale: Megatron's own scaler, shared.

Megatron Core 0.16.1 gives every member of a `ChainedOptimizer` (dense and expert parameters) its
own `DynamicGradScaler`, scales the loss by the first member's, and lets each member update its
scaler by its own overflow flag. After overflows in the dense gradients alone the scales differ, and
every expert gradient is unscaled by the wrong factor from then on, silently. Here all members share
one scaler, which moves once per step, by the flag of all members on the whole world.

The rules are Megatron's, with one difference. An overflow uses up one unit of hysteresis and, when
none is left, halves the scale; `growth_interval` good steps in a row double it. Megatron restores
the hysteresis only after a whole growth interval, so that after its first overflows every later one
halves the scale; here any good step restores it.

Also here: `classify`, the cause of an overflow, and `calibrate`, the starting scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypedDict

import torch
from megatron.core.optimizer.grad_scaler import DynamicGradScaler


class LossScaleState(TypedDict):
    """The state of a loss scale, as JSON values.

    Keys:
        value: the scale.
        growth: good steps in a row since it last moved.
        hysteresis: overflows that it still takes without falling.
    """

    value: float
    growth: int
    hysteresis: int


class LossScale(DynamicGradScaler):
    """The scaler that every chain member holds.

    Args:
        value: the starting scale, a power of two.
        growth_interval: good steps in a row that double it.
        hysteresis: overflows in a row that halve it.
        min_value: it never falls below this.
    """

    def __init__(
        self, value: float, growth_interval: int, hysteresis: int, min_value: float
    ) -> None:
        self._scale: torch.Tensor
        super().__init__(
            initial_scale=value,
            min_scale=min_value,
            growth_factor=2.0,
            backoff_factor=0.5,
            growth_interval=growth_interval,
            hysteresis=hysteresis,
        )

    @property
    def value(self) -> float:
        """The current scale."""
        return float(self._scale.item())

    @value.setter
    def value(self, value: float) -> None:
        self._scale = torch.full_like(self._scale, value)

    @property
    def at_minimum(self) -> bool:
        """True if another overflow cannot lower it."""
        return self.value <= float(self.min_scale.item())

    def state(self) -> LossScaleState:
        """Return what `restore` needs."""
        return {
            "value": self.value,
            "growth": self._growth_tracker,
            "hysteresis": self._hysteresis_tracker,
        }

    def restore(self, state: LossScaleState) -> None:
        """Continue from a state that `state()` returned."""
        self.value = state["value"]
        self._growth_tracker = state["growth"]
        self._hysteresis_tracker = state["hysteresis"]

    def update(self, found_inf: bool) -> None:
        """Do nothing: each chain member calls this, and `commit` moves the scale."""

    def commit(self, found_inf: bool) -> None:
        """Move the scale by the flag of the whole chain on the whole world; once a step."""
        super().update(found_inf)
        if not found_inf:
            self._hysteresis_tracker = self.hysteresis


OverflowCause = Literal["", "activations", "gradients", "importance_weight"]

# Beyond this the FP32 loss itself could leave its range when scaled.
LARGEST_EXPONENT = 40


def classify(*, finite_forward: bool, weight_max: float, headroom_bits: int) -> OverflowCause:
    """Name the cause of a step's overflow.

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
    """Find the largest power of two at which nothing overflows, less the headroom.

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
