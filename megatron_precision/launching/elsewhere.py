"""Jobs by nemo-run's Docker, Kubeflow and SkyPilot executors.

Docker runs on this machine and mounts the run's folder. The other two have no folder in common
with it: the configuration goes along with nemo-run's own files of the job, and `--out` is a path
of the remote side.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_precision import run_folder
from megatron_precision.config import RunConfig
from megatron_precision.errors import Problem
from megatron_precision.launching import experiment as experiments
from megatron_precision.launching import mounts
from megatron_precision.launching.jobs import CHECKOUT, Job, folders
from megatron_precision.launching.options import Options

_MODULES = {"docker": "docker", "kubeflow": "kubernetes", "skypilot": "sky"}
_EXTRAS = {"docker": "docker", "kubeflow": "nemo-run[kubeflow]", "skypilot": "nemo-run[skypilot]"}


def problems(options: Options) -> Iterator[Problem]:
    """What an executor needs on this machine, even to render a job, and does not find."""
    module = _MODULES.get(options.executor)
    if module is not None and importlib.util.find_spec(module) is None:
        yield Problem(
            f"--executor {options.executor} needs a package that is not installed", sys.executable,
            f"no module {module}", f"pip install '{_EXTRAS[options.executor]}'",
        )  # fmt: skip
    if options.executor == "kubeflow" and not _has_kubeconfig():
        yield Problem(
            "--executor kubeflow needs a cluster's configuration", "KUBECONFIG",
            "no such file, and not inside a cluster", "a kubeconfig, such as ~/.kube/config",
        )  # fmt: skip


def _has_kubeconfig() -> bool:
    paths = os.environ.get("KUBECONFIG") or "~/.kube/config"
    found = any(Path(path).expanduser().is_file() for path in paths.split(os.pathsep))
    return found or "KUBERNETES_SERVICE_HOST" in os.environ


def render(
    jobs: Sequence[Job], config: RunConfig, options: Options
) -> tuple[list[str], list[str]]:
    """What would be handed over, worked out with no such service at hand.

    Returns:
        The request for each job, and the torchrun line of each.
    """
    with tempfile.TemporaryDirectory() as scratch:
        experiment = _experiment(jobs, config, options, Path(scratch))
        with experiment:
            experiment.dryrun(log=False, delete_exp_dir=False)
            infos = [task._dryrun_info for task in experiment.jobs]
            roles = [task._executable.roles[0] for task in experiment.jobs]
            texts = [_text(info.request, options) for info in infos]
    return texts, [" ".join([role.entrypoint, *role.args]) for role in roles]


def run(jobs: Sequence[Job], config: RunConfig, options: Options) -> int:
    """Hand jobs over, one after the other, and wait for them unless the user does not.

    Returns:
        0 when all of them succeeded or were handed over, 1 otherwise.
    """
    experiment = _experiment(jobs, config, options, jobs[-1].folder.resolve() / "launcher")
    with experiment:
        experiment.run(detach=not options.wait, tail_logs=options.wait, sequential=len(jobs) > 1)
    if not options.wait:
        return 0
    return 0 if all(str(task.state) == "SUCCEEDED" for task in experiment.jobs) else 1


def _experiment(
    jobs: Sequence[Job], config: RunConfig, options: Options, home: Path
) -> Any:
    nemo_run = experiments.load(home)
    make = {"docker": _docker, "kubeflow": _kubeflow, "skypilot": _skypilot}[options.executor]
    executors = [make(nemo_run, job, config, options) for job in jobs]
    experiment = experiments.open_experiment(
        nemo_run, options.experiment_name, executors[0], home
    )
    with experiment:
        for job, executor in zip(jobs, executors, strict=True):
            words = job.command_line
            script = nemo_run.Script(path=job.module, args=words, entrypoint="python", m=True)
            experiment.add(script, executor=executor, name=job.command)
    return experiment


def _docker(nemo_run: Any, job: Job, config: RunConfig, options: Options) -> Any:
    section = options.site.section("docker")
    seen = mounts.covering(folders(config, job), options.mounts)
    return nemo_run.DockerExecutor(
        container_image=options.container_image,
        ntasks_per_node=options.gpus_per_node,
        num_gpus=options.gpus_per_node,
        runtime=section.get("runtime"),
        shm_size=section.get("shm_size", "16g"),
        ipc_mode="host",
        volumes=[str(mount) for mount in seen],
        additional_kwargs={"working_dir": str(Path.cwd())},
        retries=options.retries,
        env_vars={"PYTHONPATH": str(CHECKOUT), "PET_LOCAL_RANKS_FILTER": "0"},
        launcher=nemo_run.Torchrun(),
        packager=nemo_run.Packager(),
    )
