"""One dynamic loss scale for the whole chain of optimizers.

Megatron Core 0.16.1 gives every member of a `ChainedOptimizer` (dense and expert parameters) a
scaler of its own, scales the loss by the first member's, and lets each member update its scaler
from its own overflow flag. After overflows in the dense gradients alone the scales differ, and
every expert gradient is unscaled by the wrong factor from then on, silently. Here all members
share one scaler; they only look, and the scale moves once a step, by the flag of all of them.

Rules: an overflow uses up one unit of hysteresis and, when none is left, halves the scale; any
good step restores the hysteresis (Megatron restores it only after a whole growth interval, so
that after its first few overflows every later one halves the scale); `growth_interval` good
steps in a row double the scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class LossScale:
    """The scale and its trackers; stands in for a `MegatronGradScaler` in every chain member.

    Attributes:
        value: the current scale, a power of two.
        growth_interval: good steps in a row that double it.
        hysteresis: overflows in a row that halve it.
        min_value: it never falls below this.
    """

    value: float
    growth_interval: int
    hysteresis: int
    min_value: float
    good_steps: int = 0
    overflows_in_a_row: int = 0

    @property
    def scale(self) -> torch.Tensor:
        """[1] FP32, as Megatron's optimizers read it."""
        return torch.tensor([self.value], dtype=torch.float32)

    @property
    def inv_scale(self) -> torch.Tensor:
        """[1] FP32."""
        return torch.tensor([1.0 / self.value], dtype=torch.float32)

    def update(self, found_inf: bool) -> None:
        """Called by each chain member with its own flag; moves nothing (see `commit`)."""

    def commit(self, found_inf: bool) -> None:
        """Move the scale by the flag of the whole chain on the whole world; once a step."""
        if found_inf:
            self.good_steps = 0
            self.overflows_in_a_row += 1
            if self.overflows_in_a_row >= self.hysteresis:
                self.value = max(self.value / 2, self.min_value)
            return
        self.overflows_in_a_row = 0
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.good_steps = 0
            self.value *= 2

    def state_dict(self) -> dict[str, float]:
        """Scale and trackers, for checkpoints."""
        return {
            "value": self.value,
            "good_steps": self.good_steps,
            "overflows_in_a_row": self.overflows_in_a_row,
        }

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Restore what `state_dict` gave."""
        self.value = state["value"]
        self.good_steps = int(state["good_steps"])
        self.overflows_in_a_row = int(state["overflows_in_a_row"])
