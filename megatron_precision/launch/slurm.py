"""Renders jobs as sbatch scripts with nemo-run's Slurm executor, and submits them.

The script starts one `torchrun` on each node. Every node reads the resolved configuration from a
file in the run's folder, so that it does not pass through a shell. The user's variables are passed
by name (`--export`, `--container-env`), and their values are not written to any file.
`slurm_watch.py` follows a submitted job.
"""

from __future__ import annotations

import os
import re
import secrets
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_precision.config.errors import Problem, UserError
from megatron_precision.launch import mounts
from megatron_precision.launch.jobs import (
    CHECKOUT,
    HOME_IS_CHOSEN,
    Job,
    load,
    open_experiment,
    python_path,
)
from megatron_precision.launch.options import Options

# Slurm signals the ranks this long before the time limit, so that they can write a checkpoint.
LEAD_S = 300
_EXPORTED = ("PATH", "HOME", "USER", "LANG", "LD_LIBRARY_PATH")
# Below the ports that the kernel gives to outgoing connections.
_PORTS = range(20000, 30000)
_TORCHRUN = re.compile(r"\btorchrun --.*")
# Slurm's states of a node that cannot start jobs; a node that does not answer has a star after it.
_GONE = ("down", "error", "fail", "unknown", "powered_down")
_SETUP = Path(__file__).with_name("slurm_setup.sh")


@dataclass(frozen=True)
class Submitted:
    """A job that Slurm has accepted.

    Attributes:
        job: the job as it was described.
        number: Slurm's job id.
        logs: the folder of `log-*_<number>_<restart>.out` and `.err`; each task of an array has
            its own number.
    """

    job: Job
    number: str
    logs: Path

    def outputs(self) -> list[Path]:
        """Return the files that torchrun printed to, one for each start, the oldest first."""
        return sorted(self.logs.glob("log-*_*_*.out"), key=lambda path: path.stat().st_mtime_ns)


def slurm_problems(out: Path, options: Options) -> list[Problem]:
    """Return a problem for each folder whose name the rendered script cannot carry."""
    folders = {"--out": out.resolve(), "the working directory": Path.cwd()}
    folders |= {"the checkout": CHECKOUT}
    if not options.container_image:
        folders |= {"the Python environment": Path(sys.executable).parent}
    found = []
    for where, folder in folders.items():
        if mounts.has_odd_character(str(folder)) or shlex.quote(str(folder)) != str(folder):
            found.append(mounts.odd_path("a folder", where, str(folder)))
        # Without a container, nemo-run replaces this text everywhere in the script.
        elif not options.container_image and "/nemo_run" in str(folder):
            found.append(
                Problem("a folder that nemo-run would rename in its script", where, str(folder),
                        "a path without /nemo_run")
            )  # fmt: skip
    return found


def render(jobs: Sequence[Job], options: Options) -> tuple[list[str], list[str]]:
    """Render jobs without submitting them; it needs no Slurm and leaves no files.

    Returns:
        The sbatch script of each job, and the torchrun line of each.
    """
    with tempfile.TemporaryDirectory() as scratch:
        experiment = _experiment(jobs, options, Path(scratch))
        with experiment:
            _add(experiment, jobs, options)
            experiment.dryrun(log=False, delete_exp_dir=False)
            scripts = [task._dryrun_info.request.materialize() for task in experiment.jobs]
    return scripts, [_TORCHRUN.findall(script)[-1] for script in scripts]


def submit(jobs: Sequence[Job], options: Options) -> list[Submitted]:
    """Submit jobs to Slurm; each one starts when the one before it has succeeded.

    Raises:
        UserError: if Slurm refuses a job; the jobs that it accepted are cancelled.
    """
    experiment = _experiment(jobs, options, _home(jobs[-1]))
    from invoke.exceptions import UnexpectedExit

    with experiment:
        _add(experiment, jobs, options)
        try:
            experiment.run(detach=True)
        except UnexpectedExit as refused:
            for task in experiment.jobs:
                task.cancel(experiment._runner)
            raise UserError(
                Problem(
                    "Slurm refused the job", "sbatch", refused.result.stderr.strip(),
                    "options that this cluster takes",
                )
            ) from None  # fmt: skip
        return [
            Submitted(
                job,
                task.handle.rpartition("/")[2].partition(";")[0],
                Path(task.executor.job_dir),
            )
            for job, task in zip(jobs, experiment.jobs, strict=True)
        ]


def require_slurm(options: Options) -> list[Problem]:
    """Return the problems that keep a job from being submitted here or started on the cluster."""
    if shutil.which("sbatch"):
        return _unreachable(options)
    return [
        Problem(
            "no Slurm on this machine", "--executor slurm", "no sbatch on PATH",
            "a login node of the cluster", "--dryrun prints the script anywhere",
        )
    ]  # fmt: skip


def _unreachable(options: Options) -> list[Problem]:
    """Return a problem if too few nodes are up, in which case the job would wait for ever.

    An unknown partition and a controller that does not answer are left to `sbatch`, which reports
    them itself.
    """
    words = ["sinfo", "--noheader", "--Node", "--format", "%P %N %T"]
    words += [f"--partition={options.partition}"] if options.partition else []
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    lines = [line.split() for line in done.stdout.splitlines()]
    # The default partition has a star after its name.
    states = {
        node: state
        for partition, node, state in lines
        if options.partition or partition.endswith("*")
    }
    gone = [node for node, state in states.items() if state.endswith("*") or state in _GONE]
    left = len(states) - len(gone)
    if not gone or left >= options.nodes:
        return []
    return [
        Problem(
            "too few nodes can be reached", "--nodes",
            f"{options.nodes}, but {', '.join(f'{n} is {states[n]}' for n in gone)}",
            f"at most {left}", f"scontrol show node {gone[0]} says why",
        )
    ]  # fmt: skip


def rank_logs(job: Job) -> Path:
    """Return the folder in which torchrun keeps the output of every rank."""
    return _home(job) / "ranks"


def _home(job: Job) -> Path:
    return job.folder.resolve() / "launcher"


def _experiment(jobs: Sequence[Job], options: Options, home: Path) -> Any:
    nemo_run = load(home)
    first = _executor(nemo_run, jobs[0], options, _home(jobs[-1]))
    return open_experiment(nemo_run, options.experiment_name, first, home)


def _add(experiment: Any, jobs: Sequence[Job], options: Options) -> None:
    nemo_run = load(_home(jobs[-1]))
    before: list[str] = []
    for job in jobs:
        executor = _executor(nemo_run, job, options, _home(jobs[-1]), bool(before))
        if options.array and job is jobs[-1]:  # only training: a start is made once
            executor.array = f"1-{options.array}%1"
        script = nemo_run.Script(
            path=job.module, args=job.command_line, entrypoint="python", m=True
        )
        name = experiment.add(script, executor=executor, name=job.command, dependencies=before)
        before = [name]
    for task in experiment.jobs:
        task.executor.stderr_to_stdout = False  # nemo-run's constructor does not take it


def _executor(nemo_run: Any, job: Job, options: Options, home: Path, waits: bool = False) -> Any:
    section = options.site.section("slurm")
    exclusive = section.get("exclusive", True)
    sbatch = dict(section.get("sbatch", {}))
    if waits:  # otherwise it would wait for ever if the job before it failed
        sbatch["kill-on-invalid-dep"] = "yes"
    sbatch["export"] = ",".join(dict.fromkeys([*_EXPORTED, *options.env]))
    image = options.container_image
    seen = mounts.covering(job.container_folders, options.mounts) if image else []
    base = os.environ["NEMORUN_HOME"] if HOME_IS_CHOSEN else str(home)
    return nemo_run.SlurmExecutor(
        account=options.account,
        partition=options.partition,
        time=options.time,
        nodes=options.nodes,
        ntasks_per_node=1,
        torchrun_nproc_per_node=options.gpus_per_node,
        gpus_per_node=options.gpus_per_node if section.get("request_gpus", True) else None,
        # One task on each node starts its ranks, which share all of the node's cores and memory.
        exclusive=exclusive or None,
        mem="0" if exclusive else None,
        signal=f"TERM@{_lead_s(options)}",
        container_image=image,
        container_mounts=[str(mount) for mount in seen],
        container_env=list(options.env) if image and options.env else None,
        # Otherwise sbatch's list of names applies to srun too, and drops what the script sets.
        srun_args=["--export=ALL", *options.srun_args],
        retries=options.retries + options.restarts,
        env_vars=_environment(job, options),
        setup_lines=_setup(job, options),
        job_name_prefix=f"{options.experiment_name}.",
        additional_parameters=sbatch,
        launcher=nemo_run.Torchrun(
            rdzv_port=secrets.choice(_PORTS), rdzv_id=secrets.randbelow(10**9)
        ),
        tunnel=nemo_run.LocalTunnel(job_dir=f"{base}/experiments"),
        # The job runs in the user's working directory, so that relative paths mean the same.
        packager=nemo_run.PatternPackager(
            include_pattern="", relative_path="", symlink_from_remote_dir=str(Path.cwd())
        ),
        poll_estimated_start_time=False,
    )


def _lead_s(options: Options) -> int:
    """Return how many seconds before the time limit Slurm signals the ranks."""
    return min(LEAD_S, options.time_s // 5)


def _environment(job: Job, options: Options) -> dict[str, str]:
    """Return the variables that the script exports, quoted, because nemo-run does not quote."""
    values = {
        # The user's own entries are not in a container.
        "PYTHONPATH": shlex.quote(str(CHECKOUT) if options.container_image else python_path()),
        "LOGLEVEL": "WARNING",
        "COLUMNS": "120",
        # torchrun prints a node's first rank to the log and writes every rank to a file.
        "PET_LOCAL_RANKS_FILTER": "0",
        "PET_LOG_DIR": shlex.quote(str(rank_logs(job))),
        # The time that a rank may take to save after it is told to stop.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(10, _lead_s(options) * 9 // 10)),
    }
    if not options.container_image:
        values["PATH"] = f"{shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    return values


def _setup(job: Job, options: Options) -> str:
    errors = shlex.quote(str(job.folder.resolve() / "errors"))
    counts = f"retries={options.retries}\nrestarts={options.restarts}\n"
    return f"\nerrors={errors}\n{counts}" + _SETUP.read_text(encoding="utf-8")
