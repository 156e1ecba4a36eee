"""Watches FP16's range: the largest activation and the smallest gradients of the trainer.

Hooks on the trainer's layers record, for the micro-batch that is watched:
    the largest absolute activation: the residual stream after each layer, and the input of each
    down projection, where the gated product peaks;
    the share of entries of the hidden-state gradients that FP16 represents as subnormal or zero,
    over tokens that carry loss.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from megatron_precision.precision.dtypes import FP16_SMALLEST_NORMAL


def larger_or_nan(so_far: float, value: float) -> float:
    """Return the larger of two, or nan if either is: max() would drop a nan."""
    return math.nan if math.isnan(so_far) or math.isnan(value) else max(so_far, value)


class RangeWatch:
    """Collects range statistics of a Megatron model while `active`.

    Attributes:
        active: record now; switched on for one micro-batch a step, to keep the cost small.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.active = False
        self._loss_rows: torch.Tensor | None = None
        self._loss_tokens = 0
        self._forget()
        for name, module in model.named_modules():
            leaf = name.rpartition(".")[2]
            if leaf == "linear_fc2":
                module.register_forward_pre_hook(self._watch_input)
            elif leaf.isdigit() and name.rpartition(".")[0].endswith("layers"):
                module.register_forward_hook(self._watch_layer)

    def begin(self, loss_rows: torch.Tensor | None, device: torch.device) -> None:
        """Forget what was recorded, and record from now on.

        Args:
            loss_rows: [length, batch] bool, tokens that carry loss, in the layout of this rank's
                hidden states; None to leave gradients out.
            device: of the model.
        """
        self._forget()
        self._loss_rows = None if loss_rows is None else loss_rows.to(device)[..., None]
        self._loss_tokens = 0 if loss_rows is None else int(loss_rows.sum())
        self.active = True

    def _forget(self) -> None:
        # On the device: a number asked for in a layer would have a GPU wait for the host there.
        self._largest: torch.Tensor | None = None
        self._small: torch.Tensor | None = None
        self._entries = 0

    @property
    def act_max(self) -> float:
        """The largest absolute activation; nan where one was."""
        return 0.0 if self._largest is None else float(self._largest)

    @property
    def grad_subnormal_share(self) -> float:
        """The share of watched gradient entries below FP16's smallest normal number, 2^-14."""
        if self._small is None or not self._entries:
            return 0.0
        return float(self._small) / self._entries

    def _record_activation(self, activation: torch.Tensor) -> None:
        if activation.numel():
            largest = activation.detach().abs().amax().float()
            so_far = self._largest
            self._largest = largest if so_far is None else torch.maximum(so_far, largest)

    def _watch_input(self, _module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        if self.active:
            self._record_activation(inputs[0])

    def _watch_layer(self, _module: torch.nn.Module, _inputs: Any, output: Any) -> None:
        if not self.active:
            return
        hidden = output[0] if isinstance(output, tuple) else output
        self._record_activation(hidden)
        if self._loss_rows is not None and hidden.requires_grad:
            rows, tokens = self._loss_rows, self._loss_tokens
            hidden.register_hook(lambda grad: self._record_gradient(grad, rows, tokens))

    def _record_gradient(self, grad: torch.Tensor, rows: torch.Tensor, tokens: int) -> None:
        small = ((grad.abs() < FP16_SMALLEST_NORMAL) & rows).sum()
        self._small = small if self._small is None else self._small + small
        self._entries += tokens * grad.shape[-1]
