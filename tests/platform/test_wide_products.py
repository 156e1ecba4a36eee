"""16-bit products against FP64, and products of other dtypes left as they were.

The products are made in a process of their own, since installing changes a process for good.
"""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
SIZES = [(1, 1, 1), (3, 7, 5), (17, 64, 9), (5, 512, 11)]
FP16, BF16 = torch.float16, torch.bfloat16

PROGRAM = """
import pickle, sys
import torch
import torch.nn.functional as F
from megatron_precision.platform import wide_products

inputs = pickle.loads(open(sys.argv[1], "rb").read())

def products(cases, dtype):
    out = {}
    for name, case in cases.items():
        a, b, c, bias = (t.to(dtype) for t in case)
        two, three = (c[0], a[0], b[0]), (c, a, b)
        out[name] = {
            "mm": torch.mm(*two[1:]),
            "addmm": torch.addmm(*two, beta=0.5, alpha=2.0),
            "bmm": torch.bmm(*three[1:]),
            "baddbmm": torch.baddbmm(*three, beta=0.5, alpha=2.0),
            "linear": F.linear(a, b[0].t(), bias),
            "matmul": a @ b,
        }
    return out

wide = {d: products(inputs["cases"], d) for d in (torch.float32, torch.bfloat16)}
was_installed = wide_products.installed()
dtypes = [getattr(torch, name) for name in sys.argv[3:]]
wide_products.install(frozenset(dtypes))
wide_products.install()  # the first call decides
result = {
    "installed": (was_installed, wide_products.installed()),
    "before": wide,
    "after": {d: products(inputs["cases"], d) for d in (torch.float32, torch.bfloat16)},
    "wide": {d: products(inputs["cases"], d) for d in dtypes},
}
big = torch.full((2, 3), 200.0, dtype=torch.float16)
result["overflow"] = torch.mm(big, big.t())
unread = torch.full((2, 2), float("nan"), dtype=torch.float16)
result["beta zero"] = torch.addmm(unread, torch.ones_like(big), torch.ones_like(big).t(), beta=0)
result["gradients"] = {}
for dtype in dtypes:
    a, b, _, bias = (t.to(dtype) for t in inputs["cases"]["3x7x5"])
    a.requires_grad_(True); bias.requires_grad_(True)
    weight = b[0].t().contiguous().requires_grad_(True)
    F.linear(a, weight, bias).backward(inputs["upstream"].to(dtype))
    result["gradients"][dtype] = (a.grad, weight.grad, bias.grad)
open(sys.argv[2], "wb").write(pickle.dumps(result))
"""


def make_inputs() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        # Few enough bits that every dtype here holds the values exactly.
        return torch.randn(shape, generator=generator).bfloat16().half().float()

    cases = {
        f"{n}x{k}x{m}": (normal(2, n, k), normal(2, k, m), normal(2, n, m), normal(m))
        for n, k, m in SIZES
    }
    return {"cases": cases, "upstream": normal(2, 3, 5)}


def run_program(folder: Path, *dtypes: torch.dtype) -> tuple[dict[str, Any], dict[str, Any]]:
    """Inputs, and what a process gave that installed the wide route for `dtypes`."""
    inputs = make_inputs()
    source, target = folder / "in.pkl", folder / "out.pkl"
    source.write_bytes(pickle.dumps(inputs))
    names = [str(dtype).removeprefix("torch.") for dtype in dtypes]
    command = [sys.executable, "-c", PROGRAM, str(source), str(target), *names]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    return inputs, pickle.loads(target.read_bytes())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """A CPU with BF16 of its own."""
    return run_program(tmp_path_factory.mktemp("fp16"), FP16)


@pytest.fixture(scope="module")
def run_both(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, Any]]:
    """A CPU without."""
    return run_program(tmp_path_factory.mktemp("both"), FP16, BF16)


def exact(case: tuple[torch.Tensor, ...], operator: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The FP64 result, and the same with absolute values: what the FP32 error scales with."""

    def compute(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, bias: torch.Tensor) -> Any:
        return {
            "mm": lambda: a[0] @ b[0],
            "addmm": lambda: 0.5 * c[0] + 2.0 * (a[0] @ b[0]),
            "bmm": lambda: torch.einsum("znk,zkm->znm", a, b),
            "baddbmm": lambda: 0.5 * c + 2.0 * torch.einsum("znk,zkm->znm", a, b),
            "linear": lambda: torch.einsum("znk,km->znm", a, b[0]) + bias,
            "matmul": lambda: torch.einsum("znk,zkm->znm", a, b),
        }[operator]()

    wide = [tensor.double() for tensor in case]
    return compute(*wide), compute(*(tensor.abs() for tensor in wide))


def assert_within_one_ulp(
    got: torch.Tensor, want: torch.Tensor, magnitude: torch.Tensor, inner: int
) -> None:
    """One ulp of the FP64 result, or, where terms cancel, FP32's own accumulation error."""
    info = torch.finfo(got.dtype)
    rounded = want.to(got.dtype).double()
    ulp = torch.exp2(torch.floor(torch.log2(rounded.abs().clamp_min(info.tiny)))) * info.eps
    accumulation = inner * 2.0**-24 * magnitude
    assert ((got.double() - rounded).abs() <= torch.maximum(ulp, accumulation)).all()


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("operator", ["mm", "addmm", "bmm", "baddbmm", "linear", "matmul"])
@pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))
def test_wide_products_are_fp64_products_rounded_once(
    run_both: Any, operator: str, size: tuple[int, int, int], dtype: torch.dtype
) -> None:
    inputs, result = run_both
    name = "x".join(map(str, size))
    got = result["wide"][dtype][name][operator]
    assert got.dtype == dtype
    want, magnitude = exact(inputs["cases"][name], operator)
    assert_within_one_ulp(got, want, magnitude, size[1])


@pytest.mark.parametrize("dtype", [FP16, BF16], ids=["fp16", "bf16"])
def test_gradients_of_a_wide_linear_layer_are_fp64_ones_rounded_once(
    run_both: Any, dtype: torch.dtype
) -> None:
    inputs, result = run_both
    a, b, _, _ = (tensor.double() for tensor in inputs["cases"]["3x7x5"])
    upstream = inputs["upstream"].double()

    def compute(a: torch.Tensor, b: torch.Tensor, g: torch.Tensor) -> list[torch.Tensor]:
        return [
            torch.einsum("znm,km->znk", g, b[0]),
            torch.einsum("znm,znk->mk", g, a),
            g.sum((0, 1)),
        ]

    want = compute(a, b, upstream)
    magnitude = compute(a.abs(), b.abs(), upstream.abs())
    for got, exactly, size in zip(result["gradients"][dtype], want, magnitude, strict=True):
        assert got.dtype == dtype
        assert_within_one_ulp(got, exactly, size, 7)


def test_an_fp16_product_beyond_65504_is_infinite(run: Any) -> None:
    assert torch.equal(run[1]["overflow"], torch.full((2, 2), float("inf"), dtype=FP16))


def test_a_beta_of_zero_reads_no_addend(run: Any) -> None:
    assert torch.equal(run[1]["beta zero"], torch.full((2, 2), 3.0, dtype=FP16))


@pytest.mark.parametrize("dtype", [torch.float32, BF16], ids=["fp32", "bf16"])
def test_products_of_other_dtypes_are_bitwise_what_they_were_before_installation(
    run: Any, dtype: torch.dtype
) -> None:
    _, result = run
    assert result["installed"] == (frozenset(), frozenset((FP16,)))
    for name, before in result["before"][dtype].items():
        for operator, product in before.items():
            assert torch.equal(product, result["after"][dtype][name][operator])
            assert product.dtype == dtype


def test_by_default_what_the_cpu_has_not_is_taken_wide() -> None:
    program = (
        "from megatron_precision.platform import wide_products as w\n"
        "w.install()\n"
        "print(sorted(map(str, w.installed())))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    bf16 = [] if "avx512_bf16" in flags else ["torch.bfloat16"]
    assert done.stdout.strip() == str([*bf16, "torch.float16"])
