"""FP16 fails by range: watch the largest activation and the smallest gradients.

Hooks on the trainer's layers record, for the micro-batch that is being watched,
    the largest absolute activation: residual stream after each layer, and input of each down
    projection (where the gated product peaks);
    the share of entries of the hidden-state gradients that FP16 holds as subnormal or zero,
    over tokens that carry loss.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_precision.precision.dtypes import FP16_SMALLEST_NORMAL


def larger_or_nan(so_far: float, value: float) -> float:
    """The larger of two, or nan where either is: max() drops a nan, which must not be dropped."""
    return math.nan if math.isnan(so_far) or math.isnan(value) else max(so_far, value)


class RangeWatch:
    """Collects range statistics of a Megatron model while `active`.

    Attributes:
        active: record now; switched on for one micro-batch a step, to keep the cost small.
        loss_rows: [length, batch] bool, tokens that carry loss, in the layout of this rank's
            hidden states; None to leave gradients out.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.active = False
        self.loss_rows: torch.Tensor | None = None
        self.reset()
        for name, module in model.named_modules():
            leaf = name.rpartition(".")[2]
            if leaf == "linear_fc2":
                module.register_forward_pre_hook(self._watch_input)
            elif leaf.isdigit() and name.rpartition(".")[0].endswith("layers"):
                module.register_forward_hook(self._watch_layer)

    def reset(self) -> None:
        """Forget what was recorded."""
        self.act_max = 0.0
        self._small = 0
        self._entries = 0

    @property
    def grad_subnormal_share(self) -> float:
        """Share of watched gradient entries below FP16's smallest normal number, 2^-14."""
        return self._small / self._entries if self._entries else 0.0

    def _record_activation(self, activation: torch.Tensor) -> None:
        if activation.numel():
            largest = float(activation.detach().abs().amax())
            self.act_max = larger_or_nan(self.act_max, largest)

    def _watch_input(self, _module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.active:
            self._record_activation(inputs[0])

    def _watch_layer(self, _module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        if not self.active:
            return
        hidden = output[0] if isinstance(output, tuple) else output
        self._record_activation(hidden)
        if self.loss_rows is not None and hidden.requires_grad:
            rows = self.loss_rows
            hidden.register_hook(lambda grad: self._record_gradient(grad, rows))

    def _record_gradient(self, grad: torch.Tensor, rows: torch.Tensor) -> None:
        entries = grad[rows]
        self._small += int((entries.abs() < FP16_SMALLEST_NORMAL).sum())
        self._entries += entries.numel()
