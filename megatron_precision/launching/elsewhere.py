"""Jobs by nemo-run's Docker, Kubeflow and SkyPilot executors."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_precision.config import RunConfig
from megatron_precision.errors import Problem
from megatron_precision.launching.jobs import Job
from megatron_precision.launching.options import Options


def problems(options: Options) -> list[Problem]:
    return []


def render(jobs: Sequence[Job], config: RunConfig, options: Options) -> tuple[list[str], list[str]]:
    raise NotImplementedError


def run(job: Job, config: RunConfig, options: Options) -> int:
    raise NotImplementedError
