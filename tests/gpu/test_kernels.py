"""FP16 and BF16 kernels of one GPU against FP64.

Nothing here has been run on a GPU yet (docs/gpu.md).
"""

from __future__ import annotations

import math

import pytest
import torch
from one_gpu import DTYPES, both_dtypes

from megatron_precision.platform import cuda

pytestmark = pytest.mark.gpu


@pytest.fixture
def exact_sums() -> None:
    cuda.set_exact_accumulation()


@both_dtypes
@pytest.mark.usefixtures("exact_sums")
def test_a_long_product_is_summed_in_fp32(precision: str) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(48, 16384, generator=generator).to(DTYPES[precision])
    b = torch.randn(16384, 80, generator=generator).to(DTYPES[precision])
    exact = a.double() @ b.double()
    got = (a.cuda() @ b.cuda()).double().cpu()
    # One rounding of the result, and the noise of an FP32 sum; sums in FP16 are 10 times worse.
    eps = torch.finfo(DTYPES[precision]).eps
    noise = 16384 * 2**-24 * math.sqrt(16384)
    assert ((got - exact).abs() <= eps / 2 * exact.abs() * 1.01 + noise).all()


@both_dtypes
@pytest.mark.usefixtures("exact_sums")
def test_transformer_engines_long_product_is_summed_in_fp32(precision: str) -> None:
    te = pytest.importorskip("transformer_engine.pytorch")
    generator = torch.Generator().manual_seed(0)
    linear = te.Linear(16384, 80, bias=False, params_dtype=DTYPES[precision], device="cuda")
    a = torch.randn(48, 16384, generator=generator).to(DTYPES[precision])
    exact = a.double() @ linear.weight.detach().double().cpu().t()
    with torch.no_grad():
        got = linear(a.cuda()).double().cpu()
    eps = torch.finfo(DTYPES[precision]).eps
    noise = 16384 * 2**-24 * float(exact.abs().max())
    assert ((got - exact).abs() <= eps / 2 * exact.abs() * 1.01 + noise).all()


@both_dtypes
def test_transformer_engines_norm_rounds_once(precision: str) -> None:
    te = pytest.importorskip("transformer_engine.pytorch")
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(37, 256, generator=generator).to(DTYPES[precision])
    norm = te.RMSNorm(256, eps=1e-6, params_dtype=DTYPES[precision], device="cuda")
    wide = x.double()
    exact = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    eps = torch.finfo(DTYPES[precision]).eps
    error = (norm(x.cuda()).double().cpu() - exact).abs() / exact.abs().clamp(min=1e-3)
    assert error.max() <= 1.1 * eps


@both_dtypes
def test_fused_attention_is_as_close_to_fp64_as_the_dtype_allows(precision: str) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 4, 96, 64, generator=generator) for _ in range(3))
    attend = torch.nn.functional.scaled_dot_product_attention
    cast = [x.to(DTYPES[precision]) for x in (q, k, v)]
    exact = attend(*(x.double() for x in cast), is_causal=True)
    got = attend(*(x.cuda() for x in cast), is_causal=True).double().cpu()
    assert (got - exact).abs().max() <= 4 * torch.finfo(DTYPES[precision]).eps
