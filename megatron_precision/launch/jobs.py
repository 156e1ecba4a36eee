"""What a job is, whoever starts it: its command, its processes, its folder, its environment.

nemo-run's experiment, quiet, with a home that the caller chooses; its import takes seconds.
"""

from __future__ import annotations

import os
import shlex
import warnings
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
    """This checkout, and what the user's own PYTHONPATH has besides."""
    theirs = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    return os.pathsep.join([str(CHECKOUT), *(p for p in theirs if p and p != str(CHECKOUT))])


@dataclass(frozen=True)
class Job:
    """One torchrun world.

    Attributes:
        command: the subcommand of `python -m megatron_precision`.
        arguments: what follows `--config FILE`.
        ranks: processes of the world.
        folder: holds `config.json`, `errors/` and `launcher/` (nemo-run's files and the logs).
        module: what torchrun runs.
    """

    command: str
    arguments: tuple[str, ...]
    ranks: int
    folder: Path
    module: str = "megatron_precision"

    @property
    def command_line(self) -> list[str]:
        """The arguments of `python -m MODULE`."""
        config = str(self.folder / run_folder.CONFIG)
        return [self.command, "--config", config, *self.arguments]


def train_job(config: RunConfig, out: Path, extra: tuple[str, ...] = ()) -> Job:
    """The job that trains `config` into `out`, a folder that the caller has claimed."""
    arguments = ("--out", str(out), "--claimed", *extra)
    return Job("train", arguments, config.parallel.world_size, out)


def prepare_job(config: RunConfig, start: Path) -> Job:
    """The job that makes the warm start and the perfectible set in `start`."""
    folder = run_folder.prepare_folder(start)
    return Job("prepare", ("--out", str(folder)), config.parallel.world_size, folder)


def torchrun_line(ranks: int, command_line: list[str]) -> str:
    """What to type to run a command on `ranks` processes by hand."""
    words = ["torchrun", "--standalone", "--nproc-per-node", str(ranks), "-m", "megatron_precision"]
    return shlex.join([*words, *command_line])


def environment(ranks: int, nodes: int = 1) -> dict[str, str]:
    """What ranks need in their environment; what the user has set stays.

    Args:
        ranks: on one machine.
        nodes: of the job. The ranks of one machine meet on its loopback, which keeps gloo, torch
            and vLLM off the machine's host name, which need not resolve; several machines cannot.
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


def folders(config: RunConfig, job: Job) -> list[Path]:
    """What a job's container must see, by the names that the configuration has for it."""
    texts = (*config.task.train_sets, *config.task.eval_sets)
    sets = [parse_set(text).path.parent for text in texts]
    sets += [path.parent for path in user_files.files(config)]
    start = [Path(config.start.checkpoint)] if config.start.checkpoint else []
    return [path.absolute() for path in (CHECKOUT, Path.cwd(), job.folder, *start, *sets)]


def require_plain(words: list[str], where: str) -> None:
    """Refuse arguments that nemo-run's launchers garble.

    The local launcher's quotes reach the ranks as part of the argument; Slurm's has none.

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
    """The module `nemo_run`, which keeps its files in `home` unless NEMORUN_HOME names another.

    nemo-run reads that variable as it is imported.
    """
    os.environ.setdefault("NEMORUN_HOME", str(home.resolve()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import nemo_run
        from nemo_run.core.frontend.console.api import CONSOLE
    CONSOLE.quiet = True  # what it says of launchers is no news to the user
    return nemo_run


def open_experiment(nemo_run: Any, title: str, executor: Any, home: Path) -> Any:
    """An experiment that prints nothing of its own."""
    return nemo_run.Experiment(
        title,
        executor=executor,
        log_level="ERROR",
        base_dir=os.environ["NEMORUN_HOME"] if HOME_IS_CHOSEN else str(home.resolve()),
        clean_mode=True,
        enable_goodbye_message=False,
        skip_status_at_exit=True,
    )
