"""Runs `doctor`: what is installed, what the machine can do, what is wrong, and remedies."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from megatron_precision.checks import packages as doctor_gpu
from megatron_precision.checks.packages import Finding
from megatron_precision.config.errors import UserError
from megatron_precision.platform import process
from megatron_precision.platform.choice import choose

SMALLEST_SHARED_MEMORY_GIB = 0.25
SMALLEST_MEMORY_GIB = 8.0


def run() -> int:
    """Print every finding.

    Returns:
        0, or 1 when something that a run needs is missing or wrong.
    """
    findings = [*packages(), platform_choice(), *device(), *machine()]
    for finding in findings:
        mark = {"ok": "ok", "optional": "--", "missing": "!!"}[finding.state]
        print(f"{mark:<4}{finding.name:<22}{finding.text}")
        if finding.remedy:
            print(f"{'':<26}{finding.remedy}")
    wrong = sum(finding.state == "missing" for finding in findings)
    print(f"\n{wrong} thing(s) to repair" if wrong else "\nready")
    return 1 if wrong else 0


def packages() -> Iterator[Finding]:
    """Report the versions of Python and of the packages that a run needs or can use."""
    supported = sys.version_info >= (3, 11)
    yield Finding(
        "python",
        "ok" if supported else "missing",
        platform.python_version(),
        "" if supported else "install Python 3.11 or newer, then make clean install",
    )
    for name in ("torch", "megatron-core", "nemo-run", "transformers"):
        yield _package(name, needed=True)
    yield from doctor_gpu.findings(doctor_gpu.Packages())
    if choose_or_cpu() == "cuda" and _version("transformer-engine-torch"):
        yield doctor_gpu.te_imports()
    yield from _leptonai()
    yield apex(_version("apex"), _folder("apex"))
    yield _package("wandb", needed=False, why="only for sinks.wandb")
    yield _package("tensorboard", needed=False, why="only for sinks.tensorboard")


def apex(version: str | None, folder: Path | None) -> Finding:
    """Report which `apex` is installed, if any.

    Args:
        version: of the distribution named apex.
        folder: of the importable package apex.
    """
    if folder is None:
        return Finding("apex", "optional", "not installed (optional, GPU only)")
    if (folder / "normalization").is_dir() or (folder / "optimizers").is_dir():
        return Finding("apex", "ok", f"{version or 'unknown version'}, NVIDIA's")
    return Finding(
        "apex",
        "missing",
        f"{version or 'unknown version'}, an unrelated web toolkit of the same name",
        "pip uninstall apex; NVIDIA's Apex is not in the package index: it comes with NVIDIA's "
        "containers, or is built from its sources",
    )


def platform_choice() -> Finding:
    """Report the platform that a run would take, and the reason."""
    try:
        choice = choose()
    except UserError as error:
        problem = error.problems[0]
        return Finding(
            "platform",
            "missing",
            f"{problem.where}={problem.got} names none",
            f"set it to {problem.expected}, or not at all",
        )
    return Finding("platform", "ok", f"{choice.name}: {choice.reason}")


def choose_or_cpu() -> str:
    """Return the platform's name; `cpu` where the choice fails, which another finding reports."""
    return platform_choice().text.partition(":")[0]


def device() -> Iterator[Finding]:
    """Report the device, and the dtypes that it multiplies natively."""
    if importlib.util.find_spec("torch") is not None:
        import torch

        if torch.cuda.is_available():
            for index in range(torch.cuda.device_count()):
                gpu = torch.cuda.get_device_properties(index)
                memory_gib = gpu.total_memory / 2**30
                yield Finding(f"gpu {index}", "ok", f"{gpu.name}, {memory_gib:.0f} GiB")
            major = torch.cuda.get_device_capability()[0]
            dtypes = "fp16, bf16, fp32" if major >= 8 else "fp16, fp32 (no bf16 before Ampere)"
            yield Finding("native dtypes", "ok", dtypes)
            return
        if choose_or_cpu() == "cuda":
            yield Finding(
                "gpu",
                "missing",
                "none that torch can use, and the platform is cuda",
                "see the driver above; a machine without GPUs takes requirements/cpu.txt",
            )
            return
        yield Finding("gpu", "optional", "none that torch can use; the CPU is the platform")
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if _is_linux() else ""
    yield from cpu_dtypes(text)


def cpu_dtypes(cpuinfo: str) -> Iterator[Finding]:
    """Report the dtypes that the processor multiplies natively.

    Args:
        cpuinfo: the text of /proc/cpuinfo.
    """
    lines: dict[str, str] = {}
    for line in cpuinfo.splitlines():
        label, _, value = line.partition(":")
        lines[label.strip()] = value.strip()
    flags = set(lines.get("flags", "").split())
    yield Finding("cpu", "ok", lines.get("model name", platform.processor() or "unknown"))
    for name, native in (
        ("bf16", {"avx512_bf16", "amx_bf16"}),
        ("fp16", {"avx512_fp16", "amx_fp16"}),
    ):
        found = ", ".join(sorted(flags & native))
        wide = f"products are taken in FP32 and rounded to {name.upper()}, as a tensor core does"
        yield Finding(name, "ok", f"native ({found})" if found else f"not native: {wide}")


def machine() -> Iterator[Finding]:
    """Report cores, memory, shared memory, the compiler, and leftovers of killed runs."""
    if not _is_linux():
        yield Finding("system", "missing", platform.system(), "the engines need Linux")
        return
    cores = len(os.sched_getaffinity(0))
    yield Finding(
        "cores",
        "ok" if cores >= 2 else "optional",
        str(cores),
        "" if cores >= 2 else "the sanity recipes run two processes; they will share this core",
    )
    memory_gib = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    yield Finding(
        "memory",
        "ok" if memory_gib >= SMALLEST_MEMORY_GIB else "missing",
        f"{memory_gib:.1f} GiB",
        "" if memory_gib >= SMALLEST_MEMORY_GIB else f"{SMALLEST_MEMORY_GIB:.0f} GiB are needed",
    )
    free_gib = shutil.disk_usage(process.SHARED_MEMORY).free / 2**30
    enough = free_gib >= SMALLEST_SHARED_MEMORY_GIB
    yield Finding(
        "/dev/shm",
        "ok" if enough else "missing",
        f"{free_gib:.2f} GiB free",
        "" if enough else "ranks exchange data there; in a container, raise its --shm-size",
    )
    yield _leftovers()
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    yield Finding(
        "C++ compiler",
        "ok" if compiler else "missing",
        compiler or "none",
        "" if compiler else "torch compiles kernels for vLLM: install gcc and g++",
    )


def _leftovers() -> Finding:
    left = [path for path in process.segments() if not process.is_alive(process.job_of(path))]
    if not left:
        return Finding("leftover segments", "ok", "none")
    return Finding(
        "leftover segments",
        "optional",
        f"{len(left)} of jobs that are no more; they disturb no run, but take memory",
        f"rm {process.SHARED_MEMORY}/*{process.JOB_PREFIX}*   (while no run is going on)",
    )


def _leptonai() -> Iterator[Finding]:
    version = _version("leptonai")
    if version is None:
        return
    major_minor = tuple(int(part) for part in version.split(".")[:2])
    if major_minor >= (0, 28):
        yield Finding(
            "leptonai", "missing", version, "nemo-run cannot import it: pip install 'leptonai<0.28'"
        )


def _package(name: str, needed: bool, why: str = "") -> Finding:
    version = _version(name)
    if version:
        return Finding(name, "ok", version)
    if needed:
        return Finding(name, "missing", "not installed", "make install")
    return Finding(name, "optional", f"not installed ({why})")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _folder(module: str) -> Path | None:
    spec = importlib.util.find_spec(module)
    return Path(spec.origin).parent if spec is not None and spec.origin else None


def _is_linux() -> bool:
    return sys.platform == "linux"
