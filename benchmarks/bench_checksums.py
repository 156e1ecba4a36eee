"""How fast one thread copies, sums and checksums an FP16 matrix of Qwen3-14B.

.venv/bin/python benchmarks/bench_checksums.py --out docs/benchmarks/raw/checksums.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_precision.sync.verify import checksum

SHAPE = (17_408, 5_120)  # gate_proj


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    torch.set_num_threads(1)
    matrix = torch.randn(SHAPE).half()
    to, words = torch.empty_like(matrix), matrix.view(torch.int64)
    ways = {
        "copy": lambda: to.copy_(matrix),
        "sum of all words": words.sum,
        "checksum": lambda: checksum(matrix, SHAPE[1]),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(args.rounds):
        for name, way in ways.items():
            begin = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - begin)
    rates = {name: matrix.nbytes / 1e9 / statistics.median(s) for name, s in seconds.items()}
    for name, rate in rates.items():
        print(f"{name:<18}{rate:6.1f} GB/s")
    found = {"command": " ".join(sys.argv), "gb_per_s": rates, "seconds": seconds}
    args.out.write_text(json.dumps(found) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
