"""Runs jobs with nemo-run's Docker, Kubeflow and SkyPilot executors.

Docker runs on this machine and mounts the run's folder. Kubeflow and SkyPilot share no folder with
this machine: nemo-run sends the configuration along with the job, and `--out` is a path there.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from megatron_precision.checkpoint import run_folder
from megatron_precision.config.errors import Problem
from megatron_precision.config.schema import RunConfig
from megatron_precision.launch import log, mounts
from megatron_precision.launch.jobs import CHECKOUT, Job, load, open_experiment
from megatron_precision.launch.options import Options
from megatron_precision.platform import process

# Executors that share no folder with this machine.
REMOTE = ("kubeflow", "skypilot")
_MODULES = {"docker": "docker", "kubeflow": "kubernetes", "skypilot": "sky"}
# The configuration's path on the remote side, in the folder that nemo-run makes for a job.
_REMOTE_CONFIG = "/nemo_run/config.json"
_EXTRAS = {"docker": "docker", "kubeflow": "nemo-run[kubeflow]", "skypilot": "nemo-run[skypilot]"}


def executor_problems(options: Options) -> Iterator[Problem]:
    """Yield a problem for everything that an executor needs on this machine and does not find."""
    module = _MODULES.get(options.executor)
    if module is not None and importlib.util.find_spec(module) is None:
        yield Problem(
            f"--executor {options.executor} needs a package that is not installed", sys.executable,
            f"no module {module}", f"pip install '{_EXTRAS[options.executor]}'",
        )  # fmt: skip
    if options.executor == "kubeflow" and "workdir_pvc" not in options.site.section("kubeflow"):
        yield Problem(
            "no volume that all pods see", f"{options.site.path}: kubeflow.workdir_pvc", "nothing",
            "a claim for a volume with the models and runs", "see docs/launching.md",
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


def render(jobs: Sequence[Job], config: RunConfig, options: Options) -> tuple[list[str], list[str]]:
    """Render the requests for jobs without sending them; it needs no such service.

    Returns:
        The request for each job, and the command of each.
    """
    with tempfile.TemporaryDirectory() as scratch:
        home = Path(scratch)
        experiment = _experiment(jobs, config, options, home)
        with experiment:
            _add(experiment, jobs, config, options, home)
            experiment.dryrun(log=False, delete_exp_dir=False)
            requests = [task._dryrun_info.request for task in experiment.jobs]
            texts = [_text(request, options) for request in requests]
            lines = [_command(task) for task in experiment.jobs]
    return texts, lines


def run(jobs: Sequence[Job], config: RunConfig, options: Options, home: Path) -> int:
    """Run jobs one after the other, and wait for them unless `options.wait` is off.

    Args:
        config: the jobs' configuration, which is sent to remote executors.
        home: the folder for nemo-run's files.

    Returns:
        0 if all jobs succeeded, or were sent and are not waited for; 2 for a user error, else 1.
    """
    experiment = _experiment(jobs, config, options, home)
    with experiment:
        _add(experiment, jobs, config, options, home)
        experiment.run(detach=not options.wait, tail_logs=options.wait, sequential=len(jobs) > 1)
    if not options.wait:
        return 0
    if all(str(task.state) == "SUCCEEDED" for task in experiment.jobs):
        return 0
    print(log.describe_failure(jobs[-1].folder, home), file=sys.stderr, flush=True)
    failure = process.first_failure(jobs[-1].folder)
    return 2 if failure is not None and failure.user_error else 1


def _experiment(jobs: Sequence[Job], config: RunConfig, options: Options, home: Path) -> Any:
    nemo_run = load(home)
    first = _EXECUTORS[options.executor](nemo_run, jobs[0], config, options, home)
    return open_experiment(nemo_run, options.experiment_name, first, home)


def _add(
    experiment: Any, jobs: Sequence[Job], config: RunConfig, options: Options, home: Path
) -> None:
    nemo_run = load(home)
    for job in jobs:
        executor = _EXECUTORS[options.executor](nemo_run, job, config, options, home)
        words = job.command_line
        if options.executor in REMOTE:
            words[words.index("--config") + 1] = _REMOTE_CONFIG
            words = [word for word in words if word != "--claimed"]  # rank 0 claims --out there
        path, args = job.module, words
        if options.executor == "kubeflow":
            # The operator sets torchrun's own variables for the nodes' number and addresses.
            path, args = "torch.distributed.run", ["-m", job.module, *words]
        script = nemo_run.Script(path=path, args=args, entrypoint="python", m=True)
        experiment.add(script, executor=executor, name=job.command)


def _docker(nemo_run: Any, job: Job, config: RunConfig, options: Options, home: Path) -> Any:
    section = options.site.section("docker")
    seen = mounts.covering(job.container_folders, options.mounts)
    return nemo_run.DockerExecutor(
        container_image=options.container_image,
        ntasks_per_node=options.gpus_per_node,
        num_gpus=options.gpus_per_node,
        runtime=section.get("runtime"),
        shm_size=section.get("shm_size", "16g"),
        ipc_mode="host",
        # The container's working directory is /nemo_run/code. Mounting the user's there makes
        # relative paths mean the same.
        volumes=[*map(str, seen), f"{Path.cwd()}:/nemo_run/code"],
        retries=options.retries,
        env_vars={"PYTHONPATH": str(CHECKOUT), "PET_LOCAL_RANKS_FILTER": "0"},
        launcher=nemo_run.Torchrun(),
        packager=nemo_run.Packager(),
    )


def _kubeflow(nemo_run: Any, job: Job, config: RunConfig, options: Options, home: Path) -> Any:
    section = dict(options.site.section("kubeflow"))
    secret = section.pop("secret", "megatron-precision")
    return nemo_run.KubeflowExecutor(
        image=options.container_image,
        num_nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        retries=options.retries,
        env_vars={"PET_LOCAL_RANKS_FILTER": "0"},
        # The cluster's secret has the values, under the variables' names.
        env_list=[
            {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": name}}}
            for name in options.env
        ],
        workdir_local_path=str(_with_config(home, config)),
        packager=nemo_run.Packager(),
        **section,
    )


def _skypilot(nemo_run: Any, job: Job, config: RunConfig, options: Options, home: Path) -> Any:
    section = options.site.section("skypilot")
    config_file = _with_config(home, config) / run_folder.CONFIG
    return nemo_run.SkypilotExecutor(
        container_image=options.container_image,
        num_nodes=options.nodes,
        gpus_per_node=options.gpus_per_node,
        file_mounts={_REMOTE_CONFIG: str(config_file)},
        env_vars={"PET_LOCAL_RANKS_FILTER": "0"},
        launcher=nemo_run.Torchrun(),
        **section,
    )


def _with_config(home: Path, config: RunConfig) -> Path:
    """Write the configuration to a folder with nothing else in it, and return the folder."""
    folder = home / "config"
    folder.mkdir(parents=True, exist_ok=True)
    run_folder.write_config(config, folder)
    return folder


def _command(task: Any) -> str:
    """Return the command that every node of a rendered task runs."""
    role, names = task._executable.roles[0], task.executor.macro_values()
    role = names.apply(role) if names else role
    return " ".join([role.entrypoint, *role.args])


def _text(request: Any, options: Options) -> str:
    if options.executor == "skypilot":
        return json.dumps(request.task.to_yaml_config(), indent=2)
    if options.executor == "kubeflow":
        body = request.executor.get_job_body(request.name, request.cmd)
        script = Path(request.executor.job_dir) / "launch.sh"
        return f"{json.dumps(body, indent=2)}\n\n{script.read_text(encoding='utf-8')}"
    return str(request)


_EXECUTORS = {"docker": _docker, "kubeflow": _kubeflow, "skypilot": _skypilot}
