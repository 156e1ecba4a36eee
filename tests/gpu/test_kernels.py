"""FP16 and BF16 kernels of one GPU against FP64."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_precision.platform import cuda
from tests.gpu.one_gpu import DTYPES, both_dtypes

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


@both_dtypes
@pytest.mark.parametrize("columns", [4096, 4990])
def test_log_probs_and_their_gradients_are_those_of_fp64(precision: str, columns: int) -> None:
    from megatron_precision.actor.logprob_kernels import row_gradients, row_sums

    generator = torch.Generator().manual_seed(0)
    logits = (4 * torch.randn(21, 5120, generator=generator)).to(DTYPES[precision])
    rows = torch.tensor([0, 3, 4, 11, 20])
    targets = torch.randint(0, columns, (5,), generator=generator)
    grads = torch.randn(5, generator=generator)
    there = [t.cuda() for t in (logits, rows, targets, grads)]
    peak, total, weighted = (t.double().cpu() for t in row_sums(*there[:2], columns, 0.7))
    exact = torch.log_softmax(logits[rows, :columns].double() / 0.7, -1)
    picked = logits[rows, targets].double() / 0.7 - peak - total.log()
    assert (picked - exact.gather(-1, targets[:, None]).squeeze(-1)).abs().max() < 1e-5
    entropy = total.log() - weighted / total
    assert (entropy + (exact.exp() * exact).sum(-1)).abs().max() < 1e-5

    got = row_gradients(
        *there[:2], columns, 0.7,
        log_norms=(peak + total.log()).float().cuda(), targets=there[2], grads=there[3],
    ).double().cpu()  # fmt: skip
    expected = torch.zeros(21, 5120, dtype=torch.float64)
    onehot = torch.nn.functional.one_hot(targets, columns)
    expected[rows, :columns] = grads[:, None].double() * (onehot - exact.exp()) / 0.7
    eps = torch.finfo(DTYPES[precision]).eps
    smallest = torch.finfo(DTYPES[precision]).smallest_normal * eps
    assert ((got - expected).abs() <= eps * expected.abs() + 1e-6 + smallest).all()
