"""Where the time of a step goes, by what its kernels do: PyTorch's profiler, added up by name."""

from __future__ import annotations

import re
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from megatron_precision.platform import startup

# The first that a kernel's name matches is its class. A name with none is "elementwise": those
# names say a functor and no purpose.
CLASSES: tuple[tuple[str, str], ...] = (
    ("attention", r"fmha|flash|sdpa|attention"),
    ("optimizer", r"adam|multi_tensor|foreach"),
    ("norm", r"norm"),
    ("products", r"gemm|nvjet|cutlass|cublas|xmma|splitk|::(mm|bmm|addmm|matmul|baddbmm)\b"),
    ("log-probs", r"softmax|logsumexp|cross_entropy"),
    ("routing, gathers", r"permute|sort|topk|scatter|gather|index(?=_|select|put|func|ing)|cumsum"),
    ("copies and casts", r"memcpy|memset|copy|\bcast|_cast\b|fill|::(zero_|to|clone|cat)\b"),
    ("communication", r"nccl|all_?reduce|reduce_scatter"),
)
REST = "elementwise"
LONGEST = 20


def class_of(kernel: str) -> str:
    """What a kernel is for, by its name."""
    return next((name for name, words in CLASSES if re.search(words, kernel, re.I)), REST)


def profiled(step: Callable[[], object]) -> dict[str, Any]:
    """Run a step once under the profiler.

    Returns:
        `seconds` of the step, profiler included; `busy_s`, the sum of its kernels, which run one
        after the other on a GPU; `by_class`, seconds of each; and the longest kernels by name. On
        a CPU PyTorch's operators stand for kernels.
    """
    gpu = startup.device().type == "cuda"
    # A step of a large model has a million operators on the host; nobody asks for them here.
    activity = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as found:
        begin = time.perf_counter()
        step()
        if gpu:
            torch.cuda.synchronize()
        took = time.perf_counter() - begin
    kernels: dict[str, tuple[float, int]] = {}
    for event in found.key_averages():
        # Operators of the host carry their kernels' time too; an annotation spans others.
        if event.is_user_annotation or (event.device_type.name == "CUDA") != gpu:
            continue
        microseconds = event.self_device_time_total if gpu else event.self_cpu_time_total
        kernels[event.key] = (microseconds / 1e6, event.count)
    by_class: dict[str, float] = defaultdict(float)
    for name, (seconds, _count) in kernels.items():
        by_class[class_of(name)] += seconds
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:LONGEST]
    return {
        "seconds": took,
        "busy_s": sum(by_class.values()),
        "by_class": dict(sorted(by_class.items(), key=lambda item: -item[1])),
        "longest": [{"kernel": k, "seconds": s, "count": n} for k, (s, n) in longest],
    }
