"""Memory of a CPU process: a heap that is kept, and kernel caches that end.

A CPU step frees and asks for the same large activations again and again. By default glibc hands
every block of some megabytes back to the kernel when it is freed, and the next one is paid for
page by page: a fifth of a tiny model's step.

oneDNN keeps a compiled kernel for every shape it has met, up to 1024 in each of two caches. The
experts of an MoE model meet new shapes in every micro-batch, and memory grew by 35 MiB an
iteration (PyTorch 2.13, BF16).

All settings are of this process alone and change no number.
"""

from __future__ import annotations

import ctypes
import os

# From glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
_NEVER = 2**31 - 1


def bound_kernel_caches(kernels: int = 128) -> None:
    """Keep the last `kernels` of oneDNN and of PyTorch's binding to it; call before torch's import.

    What the user has set stays. 128 hold every shape of a dense model's step.
    """
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(kernels))
    os.environ.setdefault("LRU_CACHE_CAPACITY", str(kernels))


def keep_freed_blocks() -> bool:
    """Let freed blocks stay in the process, in one heap, backed by huge pages where the kernel can.

    One heap, because autograd frees in its own thread what the main thread has allocated. A
    second heap would hold as much again.

    Returns:
        Whether the C library took the settings; another library than glibc has none of them.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # PyTorch reads it at its first allocation
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, _NEVER), (_M_ARENA_MAX, 1))
    return all(mallopt(setting, value) == 1 for setting, value in settings)
