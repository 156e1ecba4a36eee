"""Collects the differences between vLLM 0.32 (CPU) and 0.26 (GPU hosts with torch 2.11).

`tools/check_vllm_names.py` looks in an installed vLLM for every name that this project uses. The
differences are:

- the model runner: 0.26 takes its second one for dense models, which has no hooks for sampled
  log-probs and routed experts; the first one is asked for, as in the CPU build;
- the order of values that the runner's `_bookkeeping_sync` returns;
- memory: 0.26 wants a share of the GPU to be free at its start even if the size of the KV cache is
  given, and counts the trainer's memory as taken.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, get_args

from megatron_precision.platform.choice import Platform
from megatron_precision.platform.patching import UpstreamChangedError


@dataclass(frozen=True)
class BookkeepingPlaces:
    """The positions of the values that we read from what `_bookkeeping_sync` returns."""

    logprobs: int
    tokens: int
    requests: int


def bookkeeping_places() -> BookkeepingPlaces:
    """Read the positions from the installed version's annotation.

    Raises:
        UpstreamChangedError: where the annotation says them no longer.
    """
    from vllm.v1.outputs import LogprobsLists
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    parts = get_args(GPUModelRunner._bookkeeping_sync.__annotations__["return"])
    wanted = {"logprobs": LogprobsLists | None, "tokens": list[list[int]], "requests": list[str]}
    found = {name: [i for i, p in enumerate(parts) if p == kind] for name, kind in wanted.items()}
    unclear = [name for name, places in found.items() if len(places) != 1]
    if unclear:
        raise UpstreamChangedError(
            "vllm: GPUModelRunner._bookkeeping_sync returns "
            f"{parts}, in which the place of {', '.join(unclear)} is not clear. Use the pinned "
            "versions (requirements/), or update rollout/vllm_versions.py for the new one."
        )
    return BookkeepingPlaces(**{name: places[0] for name, places in found.items()})


def set_environment() -> None:
    """Set the environment variables that vLLM reads as it is imported, and Triton later."""
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "0"
    # Triton multiplies FP32 in TF32 unless told; its attention is what FP32 engines have on a GPU.
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
    os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")


def platform_arguments(platform: Platform, kv_cache_bytes: int) -> dict[str, Any]:
    """Return a platform's `EngineArgs`: the KV cache's size, and the experts' kernel.

    Args:
        kv_cache_bytes: of one rank.
    """
    arguments: dict[str, Any] = {"kv_cache_memory_bytes": kv_cache_bytes}
    if platform == "cuda":
        # Checked against the free memory at start-up, and read for nothing else here.
        arguments["gpu_memory_utilization"] = 0.01
        # Left to itself vLLM takes kernels that exist for BF16 alone where it has them, and then
        # FP16 and BF16 would differ in more than the dtype; and Triton's read weights as loaded.
        arguments["moe_backend"] = "triton"
    return arguments
