"""Maps the policy's names to torch dtypes and back; no other module spells a 16-bit torch dtype."""

from __future__ import annotations

import torch

from megatron_precision.precision.policy import DType

TORCH_DTYPE: dict[DType, torch.dtype] = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
}
_NAME = {dtype: name for name, dtype in TORCH_DTYPE.items()}

FP16_MAX = torch.finfo(torch.float16).max  # 65504
FP16_SMALLEST_NORMAL = torch.finfo(torch.float16).smallest_normal  # 2^-14


def torch_dtype(name: DType) -> torch.dtype:
    """Return the torch dtype of a policy's name."""
    return TORCH_DTYPE[name]


def dtype_name(dtype: torch.dtype) -> str:
    """Return the policy's name of a torch dtype; other dtypes keep torch's name."""
    return _NAME.get(dtype, str(dtype).removeprefix("torch."))
