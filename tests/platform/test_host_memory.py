"""Freed blocks stay in the process: what is freed is not paid for again."""

from __future__ import annotations

import subprocess
import sys

# 64 MiB, allocated and freed 20 times; prints the page faults of the last ten.
PROGRAM = """
import resource, sys
if sys.argv[1] == "kept":
    from megatron_precision.platform.cpu import keep_freed_blocks
    assert keep_freed_blocks()
import torch
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(2**24)
before = faults()
for _ in range(10):
    torch.ones(2**24)
print(faults() - before)
"""


def _faults(mode: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, mode], check=True, capture_output=True, text=True
    )
    return int(done.stdout)


def test_freed_blocks_are_used_again() -> None:
    shipped, kept = _faults("shipped"), _faults("kept")
    assert shipped > 1000, "glibc gives large blocks back by default"
    assert kept < shipped / 10
