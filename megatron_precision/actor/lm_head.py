"""The output projection in FP32, where the policy wants it there.

Weight and hidden states are 16-bit numbers that FP32 holds exactly; their product is then neither
accumulated nor rounded to 16 bits, and its gradients are rounded where they leave for the layers
below and for the weight. The engine's head is vLLM's own (its `head_dtype`).
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import ColumnParallelLinear


class WideHead(ColumnParallelLinear):
    """Megatron's output layer on its inputs in FP32."""

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Logits.

        Args:
            input_: [s, c, hidden] in the parameters' dtype.
            weight: [padded_vocab / TP, hidden], where it is the embedding's; else the layer's own.

        Returns:
            (logits [s, c, padded_vocab / TP] FP32, no bias).
        """
        weight = self.weight if weight is None else weight
        found: tuple[torch.Tensor, torch.Tensor | None] = super().forward(
            input_.float(), weight.float(), runtime_gather_output
        )
        return found


def widen(output_layer: ColumnParallelLinear) -> None:
    """Let a model's output layer multiply in FP32; `GPTModel` makes it of a class of its own."""
    assert type(output_layer) is ColumnParallelLinear
    output_layer.__class__ = WideHead
