"""A job on a Slurm cluster, by nemo-run's Slurm executor: what is rendered, and its submission.

The script asks for one `torchrun` a node. The resolved configuration is a file in the run's
folder, which all nodes see, so that nothing of it passes through a shell. Variables are handed
over by name (`--export`, `--container-env`): a value that launch.py did not make itself is
written into no file. Watching the job is `slurm_watch.py`'s.
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
from megatron_precision.config.schema import RunConfig
from megatron_precision.launch import jobs as experiments
from megatron_precision.launch import mounts
from megatron_precision.launch.jobs import CHECKOUT, Job, folders, python_path
from megatron_precision.launch.options import Options

# Slurm signals the ranks so long before the time limit; what they save must be written by then.
LEAD_S = 300
_EXPORTED = ("PATH", "HOME", "USER", "LANG", "LD_LIBRARY_PATH")
# Below the ports that the kernel gives to outgoing connections.
_PORTS = range(20000, 30000)
_TORCHRUN = re.compile(r"\btorchrun --.*")
# Slurm's words for a node that nothing can be started on; those that do not answer have a star.
_GONE = ("down", "error", "fail", "unknown", "powered_down")
_SETUP = Path(__file__).with_name("slurm_setup.sh")


@dataclass(frozen=True)
class Submitted:
    """A job that Slurm has taken.

    Attributes:
        job: what was submitted.
        number: Slurm's own id of it.
        logs: the folder of `log-*_<number>_<restart>.out` and `.err`; a task of an array has a
            number of its own.
    """

    job: Job
    number: str
    logs: Path

    def outputs(self) -> list[Path]:
        """What torchrun of every start printed, in their order."""
        return sorted(self.logs.glob("log-*_*_*.out"), key=lambda path: path.stat().st_mtime_ns)


def slurm_problems(out: Path, options: Options) -> list[Problem]:
    """Folders that the rendered script cannot name."""
    folders = {"--out": out.resolve(), "the working directory": Path.cwd()}
    folders |= {"the checkout": CHECKOUT}
    if not options.container_image:
        folders |= {"the Python environment": Path(sys.executable).parent}
    found = []
    for where, folder in folders.items():
        if mounts.has_odd_character(str(folder)) or shlex.quote(str(folder)) != str(folder):
            found.append(mounts.odd_path("a folder", where, str(folder)))
        # Without a container, nemo-run replaces this text wherever the script has it.
        elif not options.container_image and "/nemo_run" in str(folder):
            found.append(
                Problem("a folder that nemo-run would rename in its script", where, str(folder),
                        "a path without /nemo_run")
            )  # fmt: skip
    return found


def render(jobs: Sequence[Job], config: RunConfig, options: Options) -> tuple[list[str], list[str]]:
    """What would be submitted, worked out with no Slurm at hand; nothing is left behind.

    Returns:
        The sbatch script of each job, and the torchrun line of each.
    """
    with tempfile.TemporaryDirectory() as scratch:
        experiment = _experiment(jobs, config, options, Path(scratch))
        with experiment:
            _add(experiment, jobs, config, options)
            experiment.dryrun(log=False, delete_exp_dir=False)
            scripts = [task._dryrun_info.request.materialize() for task in experiment.jobs]
    return scripts, [_TORCHRUN.findall(script)[-1] for script in scripts]


def submit(jobs: Sequence[Job], config: RunConfig, options: Options) -> list[Submitted]:
    """Hand jobs to Slurm, each to be started when the one before it has succeeded.

    Raises:
        UserError: where Slurm refuses; what it has taken is cancelled.
    """
    experiment = _experiment(jobs, config, options, _home(jobs[-1]))
    from invoke.exceptions import UnexpectedExit

    with experiment:
        _add(experiment, jobs, config, options)
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
    """What is missing on this machine to submit, and on the cluster to start the job."""
    if shutil.which("sbatch"):
        return _unreachable(options)
    return [
        Problem(
            "no Slurm on this machine", "--executor slurm", "no sbatch on PATH",
            "a login node of the cluster", "--dryrun prints the script anywhere",
        )
    ]  # fmt: skip


def _unreachable(options: Options) -> list[Problem]:
    """Nodes that are down or do not answer, where too few are left: the job would wait for ever.

    What Slurm itself says of a partition or a controller that is not there comes with `sbatch`.
    """
    words = ["sinfo", "--noheader", "--Node", "--format", "%P %N %T"]
    words += [f"--partition={options.partition}"] if options.partition else []
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    lines = [line.split() for line in done.stdout.splitlines()]
    # The partition that a job gets which names none has a star.
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
    """Where torchrun keeps what every rank prints."""
    return _home(job) / "ranks"


def _home(job: Job) -> Path:
    return job.folder.resolve() / "launcher"


def _experiment(jobs: Sequence[Job], config: RunConfig, options: Options, home: Path) -> Any:
    nemo_run = experiments.load(home)
    first = _executor(nemo_run, jobs[0], config, options, _home(jobs[-1]))
    return experiments.open_experiment(nemo_run, options.experiment_name, first, home)


def _add(experiment: Any, jobs: Sequence[Job], config: RunConfig, options: Options) -> None:
    nemo_run = experiments.load(_home(jobs[-1]))
    before: list[str] = []
    for job in jobs:
        executor = _executor(nemo_run, job, config, options, _home(jobs[-1]), bool(before))
        if options.array and job is jobs[-1]:  # a start is made once
            executor.array = f"1-{options.array}%1"
        script = nemo_run.Script(
            path=job.module, args=job.command_line, entrypoint="python", m=True
        )
        name = experiment.add(script, executor=executor, name=job.command, dependencies=before)
        before = [name]
    for task in experiment.jobs:
        task.executor.stderr_to_stdout = False  # nemo-run's constructor does not take it


def _executor(
    nemo_run: Any,
    job: Job,
    config: RunConfig,
    options: Options,
    home: Path,
    waits: bool = False,
) -> Any:
    section = options.site.section("slurm")
    exclusive = section.get("exclusive", True)
    sbatch = dict(section.get("sbatch", {}))
    if waits:  # else it would wait for ever where the job before it has failed
        sbatch["kill-on-invalid-dep"] = "yes"
    sbatch["export"] = ",".join(dict.fromkeys([*_EXPORTED, *options.env]))
    image = options.container_image
    seen = mounts.covering(folders(config, job), options.mounts) if image else []
    base = os.environ["NEMORUN_HOME"] if experiments.HOME_IS_CHOSEN else str(home)
    return nemo_run.SlurmExecutor(
        account=options.account,
        partition=options.partition,
        time=options.time,
        nodes=options.nodes,
        ntasks_per_node=1,
        torchrun_nproc_per_node=options.gpus_per_node,
        gpus_per_node=options.gpus_per_node if section.get("request_gpus", True) else None,
        # One task a node that starts the ranks: all of the node's cores and memory are theirs.
        exclusive=exclusive or None,
        mem="0" if exclusive else None,
        signal=f"TERM@{_lead_s(options)}",
        container_image=image,
        container_mounts=[str(mount) for mount in seen],
        container_env=list(options.env) if image and options.env else None,
        # sbatch's list of names would otherwise hold for srun too, and drop what the script sets.
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
        # The job works where the user does: relative paths mean the same in both.
        packager=nemo_run.PatternPackager(
            include_pattern="", relative_path="", symlink_from_remote_dir=str(Path.cwd())
        ),
        poll_estimated_start_time=False,
    )


def _lead_s(options: Options) -> int:
    """Seconds before the time limit at which the ranks are told; short limits have short leads."""
    return min(LEAD_S, options.time_s // 5)


def _environment(job: Job, options: Options) -> dict[str, str]:
    """What the script exports; nemo-run writes values as they are, so they are quoted here."""
    values = {
        # What the user has here is not in a container.
        "PYTHONPATH": shlex.quote(str(CHECKOUT) if options.container_image else python_path()),
        "LOGLEVEL": "WARNING",
        "COLUMNS": "120",
        # torchrun: a node's first rank in the log, every rank in a file.
        "PET_LOCAL_RANKS_FILTER": "0",
        "PET_LOG_DIR": shlex.quote(str(rank_logs(job))),
        # A rank that has been told to stop may take so long to save.
        "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(max(10, _lead_s(options) * 9 // 10)),
    }
    if not options.container_image:
        values["PATH"] = f"{shlex.quote(str(Path(sys.executable).parent))}:$PATH"
    return values


def _setup(job: Job, options: Options) -> str:
    errors = shlex.quote(str(job.folder.resolve() / "errors"))
    counts = f"retries={options.retries}\nrestarts={options.restarts}\n"
    return f"\nerrors={errors}\n{counts}" + _SETUP.read_text(encoding="utf-8")
