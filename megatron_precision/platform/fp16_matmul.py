"""FP16 matrix products on a CPU without AVX-512 FP16: FP32 accumulation, rounded once to FP16.

A tensor core multiplies FP16 inputs exactly, accumulates in FP32 and rounds the sum to FP16.
PyTorch's own FP16 product on such a CPU is a scalar loop at about 1 GFLOP/s; widening both
inputs (exact), multiplying in FP32 and rounding the result computes what the tensor core
computes, some 100 times faster. FP32 and BF16 products are left to PyTorch untouched.

The change is made under autograd, at the dispatcher's CPU key, so that Megatron's autograd
functions, their backward passes and vLLM's FP16 linear layers all multiply alike. It is an
emulation of a GPU's arithmetic and is documented as such in every report.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

_OPERATORS = ("mm", "addmm", "bmm", "baddbmm")
_library: torch.library.Library | None = None


def install() -> None:
    """Register the FP16 route for mm, addmm, bmm and baddbmm on the CPU; once a process."""
    global _library
    if _library is not None:
        return
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # torch warns that a kernel is overridden; overriding it is what this module is for.
        warnings.simplefilter("ignore", UserWarning)
        for name in _OPERATORS:
            kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
            library.impl(name, _widened(kernel), "CPU", with_keyset=True)
    _library = library


def installed() -> bool:
    """Whether this process multiplies FP16 by the FP32 route."""
    return _library is not None


def _widened(kernel: Any) -> Callable[..., torch.Tensor]:
    def product(keyset: Any, first: torch.Tensor, *rest: Any, **scalars: Any) -> torch.Tensor:
        if first.dtype is not torch.float16:
            return kernel.call_boxed(keyset, first, *rest, **scalars)
        wide = [t.float() if isinstance(t, torch.Tensor) else t for t in (first, *rest)]
        return kernel.call_boxed(keyset, *wide, **scalars).to(torch.float16)

    return product
