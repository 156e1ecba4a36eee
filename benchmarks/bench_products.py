"""Rates of 16-bit matrix products on this CPU: PyTorch's own, and by way of FP32.

    .venv/bin/python benchmarks/bench_products.py --out docs/benchmarks/raw/products.json

One thread; processor time, so that others' work on the machine counts little; the best of ten.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

# [tokens, inner] x [inner, outer]: the tiny model's projections, and a larger one.
SHAPES = ((1024, 128, 384), (256, 128, 128), (512, 1024, 1024))
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def gflops(product: Callable[[], object], operations: int) -> float:
    """The best rate of ten, after one that is not counted."""
    product()
    seconds = []
    for _ in range(10):
        begin = time.process_time()
        product()
        seconds.append(time.process_time() - begin)
    return operations / min(seconds) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    torch.set_num_threads(1)
    rows = []
    for rows_, inner, outer in SHAPES:
        for name, dtype in DTYPES.items():
            a = torch.randn(rows_, inner).to(dtype)
            b = torch.randn(inner, outer).to(dtype)
            own = gflops(lambda a=a, b=b: a @ b, 2 * rows_ * inner * outer)
            wide = gflops(
                lambda a=a, b=b: (a.float() @ b.float()).to(a.dtype), 2 * rows_ * inner * outer
            )
            rows.append(
                {
                    "shape": [rows_, inner, outer],
                    "dtype": name,
                    "own_gflops": round(own, 1),
                    "by_fp32_gflops": round(wide, 1),
                }
            )
            print(rows[-1])
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((x for x in lines if x.startswith("flags")), "").split()
    kept = sorted(f for f in flags if f.startswith(("avx", "amx")))
    report = {"cpu_flags": kept, "torch": torch.__version__, "products": rows}
    out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
