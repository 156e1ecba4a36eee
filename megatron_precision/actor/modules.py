"""Defines the modules that the local layer spec needs beside Megatron's own.

Attention: FP16 and BF16 use Megatron's local attention, which writes every head's scores to memory
in the parameters' dtype, since its rounding is what a run measures. In FP32 PyTorch's fused kernel
gives the same result to the last bits in less time. Both take packed sequences one by one.

Output projection in FP32, if the policy asks for it: 16-bit weights and hidden states are exact in
FP32, so their product is not rounded to 16 bits; gradients are rounded where they leave the layer.
The engine's head is vLLM's own (`head_dtype`).

RMSNorm: Megatron's fallback norm refuses sequence parallelism, and PyTorch's rounds where
Transformer Engine does not. This one computes `x * rsqrt(mean(x^2) + eps) * weight` in FP32 and
rounds once, as Transformer Engine does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import ColumnParallelLinear
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def each_sequence(
    attend: Attend,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    packed: PackedSeqParams,
) -> torch.Tensor:
    """Attend to packed sequences one after another.

    Args:
        attend: of [tokens, 1, heads, head_dim] to [tokens, 1, heads × head_dim].
        query: [t, heads, head_dim].
        key, value: [t, KV heads, head_dim].

    Returns:
        [t, heads × head_dim].
    """
    sizes = packed.cu_seqlens_q.diff().tolist()
    sequences = zip(*(x.unsqueeze(1).split(sizes) for x in (query, key, value)), strict=True)
    return torch.cat([attend(*parts) for parts in sequences]).squeeze(1)


class ScoresAttention(DotProductAttention):
    """Megatron's local attention, which writes its scores; packed sequences too."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: None,
        packed_seq_params: PackedSeqParams | None = None,
        **options: Any,
    ) -> torch.Tensor:
        """Attend; shapes as `FusedAttention.forward`."""

        def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            found: torch.Tensor = super(ScoresAttention, self).forward(
                q, k, v, attention_mask, **options
            )
            return found

        if packed_seq_params is None:
            return attend(query, key, value)
        return each_sequence(attend, query, key, value, packed_seq_params)


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
        packed_seq_params: PackedSeqParams | None = None,
        **_options: Any,
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: [tokens, sequences, heads, head_dim]; packed, [tokens, heads, head_dim].
            key, value: the same with KV heads.

        Returns:
            [tokens, sequences, heads × head_dim]; packed, [tokens, heads × head_dim].
        """
        assert attention_mask is None, "right-padded sequences need no mask beyond the causal one"
        if packed_seq_params is not None:
            return each_sequence(self._attend, query, key, value, packed_seq_params)
        return self._attend(query, key, value)

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (query, key, value))
        out = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self._scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).flatten(2)


class WideHead(ColumnParallelLinear):
    """Megatron's output layer on its inputs in FP32."""

    def forward(
        self,
        input_: torch.Tensor,
        weight: torch.Tensor | None = None,
        runtime_gather_output: bool | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Compute the logits.

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
    """Replace a model's output layer by one that multiplies in FP32."""
    assert type(output_layer) is ColumnParallelLinear
    output_layer.__class__ = WideHead


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
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Normalise [..., hidden_size]; the dtype is kept."""
        wide = hidden.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * scale * self.weight.float()).to(hidden.dtype)
