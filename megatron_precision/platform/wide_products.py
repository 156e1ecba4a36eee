"""Multiplies 16-bit matrices on a CPU without such instructions: FP32 sums, rounded once.

A tensor core multiplies 16-bit inputs exactly, accumulates in FP32 and rounds the sum to 16 bits.
PyTorch's own product on such a CPU is a scalar loop at 1 to 10 GFLOP/s. Widening both inputs, which
is exact, multiplying in FP32 and rounding the result gives what the tensor core gives, some ten
times faster (BF16 without AVX-512 BF16) to 100 times (FP16). FP32 products, and BF16 products on a
CPU that has them, stay PyTorch's.

The change is made below autograd, at the dispatcher's CPU key, so that Megatron's autograd
functions, their backward passes and vLLM's linear layers multiply alike. Every report says that
this emulates a GPU's arithmetic.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch

_OPERATORS = ("mm", "addmm", "bmm", "baddbmm")
_library: torch.library.Library | None = None
_widened: frozenset[torch.dtype] = frozenset()


def not_native() -> frozenset[torch.dtype]:
    """Return the 16-bit dtypes whose products this CPU has no instructions for.

    FP16 is always one: what AVX-512 FP16 accumulates in is the library's choice.
    """
    bf16 = () if torch.cpu._is_avx512_bf16_supported() else (torch.bfloat16,)
    return frozenset((torch.float16, *bf16))


def install(dtypes: frozenset[torch.dtype] | None = None) -> None:
    """Register the wide route for mm, addmm, bmm and baddbmm on the CPU, once per process.

    Args:
        dtypes: whose products take it; by default those that this CPU has not.
    """
    global _library, _widened
    if _library is not None:
        return
    _widened = not_native() if dtypes is None else dtypes
    library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        # torch warns that a kernel is overridden; overriding it is what this module is for.
        warnings.simplefilter("ignore", UserWarning)
        for name in _OPERATORS:
            kernel = torch.library.get_kernel(f"aten::{name}", "CPU")
            library.impl(name, _wide(kernel, _widened), "CPU", with_keyset=True)
    _library = library


def installed() -> frozenset[torch.dtype]:
    """Return the dtypes that this process multiplies by the wide route."""
    return _widened


def _wide(kernel: Any, dtypes: frozenset[torch.dtype]) -> Callable[..., torch.Tensor]:
    def product(keyset: Any, first: torch.Tensor, *rest: Any, **scalars: Any) -> torch.Tensor:
        if first.dtype not in dtypes:
            return kernel.call_boxed(keyset, first, *rest, **scalars)
        wide = [t.float() if isinstance(t, torch.Tensor) else t for t in (first, *rest)]
        return kernel.call_boxed(keyset, *wide, **scalars).to(first.dtype)

    return product
