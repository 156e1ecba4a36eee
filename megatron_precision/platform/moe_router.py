"""Megatron's router without Transformer Engine, on either platform."""

from __future__ import annotations

from megatron_precision.platform.patching import Patch

WITHOUT_TRANSFORMER_ENGINE = Patch(
    "megatron.core.transformer.moe.moe_utils",
    "te_general_gemm",
    lambda original: original,
    "the router uses this name unguarded; without Transformer Engine it is not defined",
    "megatron-core 0.16.1",
    may_be_missing=True,
)
