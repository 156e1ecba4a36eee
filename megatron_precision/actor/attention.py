"""Attention without a matrix of scores, for a precision whose rounding nobody studies.

Megatron's local attention writes the scores of every head to memory, in the parameters' dtype, as
its GPU kernels' unfused form did; FP16 and BF16 keep it, since where it rounds is what a run
measures. In FP32 PyTorch's fused kernel gives the same result to the last bits, in less time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig


class FusedAttention(MegatronModule):
    """Causal self-attention as a `core_attention` of Megatron's layer spec.

    Raises:
        ValueError: for another mask or a dropout.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        softmax_scale: float | None = None,
        **_groups: Any,
    ) -> None:
        super().__init__(config=config)
        if attn_mask_type != AttnMaskType.causal or config.attention_dropout:
            raise ValueError(f"layer {layer_number}: {attn_mask_type} with {attention_type}")
        self._scale = softmax_scale

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        **_options: Any,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [tokens, sequences, heads, head_dim].
            key, value: [tokens, sequences, KV heads, head_dim].

        Returns:
            [tokens, sequences, heads × head_dim].
        """
        assert attention_mask is None, "right-padded sequences need no mask beyond the causal one"
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self._scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)
