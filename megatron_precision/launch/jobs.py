"""Describes jobs for every launcher, and opens nemo-run's experiments.

A `Job` is one torchrun world: its command, number of ranks, folder and environment. `load` and
`open_experiment` give the launchers a nemo-run that prints nothing and keeps its files in the
job's folder.
"""

from __future__ import annotations

import os
import shlex
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_precision.checkpoint import run_folder
from megatron_precision.config import user_files
from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.schema import RunConfig
from megatron_precision.data.prompts import parse_set

CHECKOUT = Path(__file__).resolve().parents[2]


def python_path() -> str:
    """Return the PYTHONPATH of a job: this checkout, then the user's own entries."""
    theirs = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(CHECKOUT), *(p for p in theirs if p and p != str(CHECKOUT))])


@dataclass(frozen=True)
class Job:
    """One torchrun world.

    Attributes:
        command: the subcommand of `python -m megatron_precision`.
        arguments: what follows `--config FILE`.
        ranks: processes of the world.
        folder: has `config.json`, `errors/` and `launcher/` (nemo-run's files and the logs).
        module: the Python module that torchrun runs.
        inputs: folders that the job reads: its start checkpoint and its sets of prompts.
    """

    command: str
    arguments: tuple[str, ...]
    ranks: int
    folder: Path
    module: str = "megatron_precision"
    inputs: tuple[Path, ...] = ()

    @property
    def command_line(self) -> list[str]:
        """The arguments of `python -m MODULE`."""
        config = str(self.folder / run_folder.CONFIG)
        return [self.command, "--config", config, *self.arguments]

    @property
    def container_folders(self) -> list[Path]:
        """The folders that a container must mount, by the names that the job uses for them."""
        needed = (CHECKOUT, Path.cwd(), self.folder, *self.inputs)
        return [path.absolute() for path in needed]


def train_job(config: RunConfig, out: Path, extra: tuple[str, ...] = ()) -> Job:
    """Build the job that trains `config` into `out`, a folder that the caller has claimed.

    Args:
        extra: further arguments of `train`, such as `--resume`.
    """
    arguments = ("--out", str(out), "--claimed", *extra)
    return Job("train", arguments, config.parallel.world_size, out, inputs=_inputs(config))


def prepare_job(config: RunConfig, start: Path) -> Job:
    """Build the job that makes the warm start and the perfectible set in the folder `start`."""
    folder = run_folder.prepare_folder(start)
    arguments = ("--out", str(folder))
    return Job("prepare", arguments, config.parallel.world_size, folder, inputs=_inputs(config))


def _inputs(config: RunConfig) -> tuple[Path, ...]:
    texts = (*config.task.train_sets, *config.task.eval_sets)
    sets = [parse_set(text).path.parent for text in texts]
    sets += [path.parent for path in user_files.files(config)]
    start = [Path(config.start.checkpoint)] if config.start.checkpoint else []
    return (*start, *sets)


def torchrun_line(ranks: int, words: Sequence[str]) -> str:
    """Return the shell command that runs `python -m megatron_precision WORDS` on `ranks` ranks."""
    return shlex.join(["torchrun", *torchrun_arguments(ranks, words)])


def torchrun_arguments(
    ranks: int, words: Sequence[str], module: str = "megatron_precision"
) -> list[str]:
    """Return torchrun's arguments for a world on this machine.

    Args:
        words: the command line of every rank, after `python -m MODULE`.
    """
    return ["--standalone", "--nproc-per-node", str(ranks), "-m", module, *words]


def environment(ranks: int, nodes: int = 1) -> dict[str, str]:
    """Return the environment variables that ranks need; a variable that the user set is kept.

    Args:
        ranks: the number of ranks on one machine.
        nodes: the number of machines. On one machine, ranks connect through the loopback
            interface, because the machine's host name may not resolve.
    """
    cores = len(os.sched_getaffinity(0))
    defaults = {
        "OMP_NUM_THREADS": str(max(1, cores // ranks)),
        # The console is for the run's own lines; what libraries say goes to the log of stderr.
        "VLLM_LOGGING_STREAM": "ext://sys.stderr",
    }
    if nodes == 1:
        defaults |= {"GLOO_SOCKET_IFNAME": "lo", "VLLM_HOST_IP": "127.0.0.1"}
    return {name: os.environ.get(name, value) for name, value in defaults.items()}


def require_plain(words: list[str], where: str) -> None:
    """Refuse arguments that nemo-run's launchers would garble.

    The local launcher quotes an argument and the quotes reach the ranks; Slurm's quotes nothing.

    Raises:
        UserError: lists the words that a shell would have to quote.
    """
    odd = [word for word in words if shlex.quote(word) != word]
    if odd:
        raise UserError(
            Problem(
                what="nemo-run's launcher cannot carry this argument",
                where=where,
                got=repr(word),
                expected="letters, digits and any of @%+=:,./-_",
                remedy="choose another folder, or one relative to the working directory",
            )
            for word in odd
        )


# Read before the first job gives nemo-run a home of its own.
HOME_IS_CHOSEN = "NEMORUN_HOME" in os.environ


def load(home: Path) -> Any:
    """Import nemo-run and make it quiet.

    Args:
        home: the folder for its files, unless the user has set NEMORUN_HOME, which nemo-run reads
            while it is imported.
    """
    os.environ.setdefault("NEMORUN_HOME", str(home.resolve()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import nemo_run
        from nemo_run.core.frontend.console.api import CONSOLE
    CONSOLE.quiet = True  # it describes its launchers, which the user did not ask about
    return nemo_run


def open_experiment(nemo_run: Any, title: str, executor: Any, home: Path) -> Any:
    """Create a nemo-run experiment that prints nothing itself."""
    return nemo_run.Experiment(
        title,
        executor=executor,
        log_level="ERROR",
        base_dir=os.environ["NEMORUN_HOME"] if HOME_IS_CHOSEN else str(home.resolve()),
        clean_mode=True,
        enable_goodbye_message=False,
        skip_status_at_exit=True,
    )
