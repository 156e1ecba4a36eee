"""RMSNorm with FP32 inside, for the local layer spec.

Megatron's fallback norm refuses sequence parallelism, and PyTorch's rounds where Transformer
Engine does not; this one computes `x * rsqrt(mean(x^2) + eps) * weight` in FP32 and rounds once,
as Transformer Engine does.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer import TransformerConfig


class RMSNorm(torch.nn.Module):
    """RMSNorm over the last dimension.

    Args (as Megatron's layer spec passes them):
        config: gives the parameter dtype and whether the sequence is sharded.
        hidden_size: size of the last dimension.
        eps: added to the mean square.
    """

    def __init__(
        self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6, **_unused: Any
    ) -> None:
        super().__init__()
        self.eps = eps
        device = "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device=device)
        self.weight = torch.nn.Parameter(ones)
        # Without this mark the gradients of a sequence-sharded norm are never summed over the
        # tensor-parallel ranks, and the ranks' copies drift apart without an error.
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise [..., hidden_size]; the dtype is kept."""
        wide = hidden.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight.float()).to(hidden.dtype)
