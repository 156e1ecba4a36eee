"""Runs one rank of a job.

A rank ends when its parent ends. If its work fails, it records the reason in the run's folder and
exits at once, without waiting for peers that may hang in a collective.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from megatron_precision.checkpoint import folders
from megatron_precision.config.errors import STOPPED, Problem, Stopped, UserError
from megatron_precision.config.schema import RunConfig
from megatron_precision.launch.jobs import environment, torchrun_arguments
from megatron_precision.platform import process

# Long enough for rank 0 to print, short enough that nobody notices.
USER_ERROR_WAIT_S = 3.0
# The words of gloo and NCCL when a peer is gone.
_BY_A_PEER = re.compile(r"Connection (closed|reset) by peer|ncclRemoteError")
_LOST_A_PEER = "lost a peer, which left no reason (torchrun's summary names one that was killed):"
_guards: list[process.Guard] = []


def number() -> int:
    """Return this process's global rank; 0 outside torchrun."""
    return int(os.environ.get("RANK", "0"))


def require_world(config: RunConfig, line: str) -> None:
    """Check that torchrun started as many processes as the layout has ranks.

    A world of one needs no torchrun; this function sets its environment.

    Args:
        config: the resolved configuration.
        line: the command that the error suggests.

    Raises:
        UserError: for another number of processes, or an engine on more than one machine.
    """
    wanted = config.parallel.world_size
    found = int(os.environ.get("WORLD_SIZE", "1"))
    if found != wanted:
        raise UserError(
            Problem(
                what="this layout needs another number of processes",
                where="parallel.world_size",
                got=f"{found} process{'' if found == 1 else 'es'}",
                expected=f"{wanted}, started by torchrun",
                remedy=line,
            )
        )
    here = int(os.environ.get("LOCAL_WORLD_SIZE", str(found)))
    engine = config.parallel.rollout_tp_size
    if engine > here or here % engine:
        raise UserError(
            Problem(
                what="an engine would be divided over machines",
                where="parallel.rollout_tp_size",
                got=f"{engine} on machines of {here} ranks",
                expected="a divisor of the ranks of a machine",
                remedy="--set parallel.rollout_tp_size=N, or another --nproc-per-node",
            )
        )
    if "WORLD_SIZE" not in os.environ:
        become_world_of_one()


def become_world_of_one() -> None:
    """Set the environment variables that torchrun would set for a single process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(
        RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", LOCAL_WORLD_SIZE="1",
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
    )  # fmt: skip


def become_launcher(
    ranks: int, words: Sequence[str], module: str = "megatron_precision"
) -> NoReturn:
    """Start a world on this machine: torchrun replaces this process.

    Args:
        words: the command line of every rank, after `python -m MODULE`.
        module: the Python module that every rank runs.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    sys.stdout.flush()
    os.execve(
        sys.executable,
        [*torchrun, *torchrun_arguments(ranks, words, module)],
        os.environ | environment(ranks),
    )


def run(work: Callable[[], None], out: Path) -> int:
    """Run the work of a rank.

    If it fails, the process exits at once: a rank whose peers wait in a collective can hang while
    the interpreter shuts down. Exit code 2 is a user error, 75 a run that a signal stopped, and 1
    any other failure.

    Args:
        work: a function that imports the engines and does the work.
        out: the folder in which a failure writes `errors/rank<k>.txt`.

    Returns:
        0, if the work succeeded.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        process.die_with_parent()
    job = process.adopt_job()
    launched = process.is_launchers(job)
    _local_defaults()
    is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    if is_first_here and not launched:
        # No launcher removes the job's shared memory if torchrun was started by hand. The guard
        # stays open until the process ends: closing it would end the resource trackers, which
        # Python still needs to remove its own segments.
        _guards.append(process.Guard(job))
        if number() == 0:  # a later machine must not remove what a rank has already recorded
            shutil.rmtree(out / "errors", ignore_errors=True)  # from an earlier attempt
    if not launched:
        _quieten_libraries()
    try:
        work()
    except Stopped as stop:
        if number() == 0:
            print(stop, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(STOPPED)
    except Exception as error:  # the boundary of the process
        end(out, error)
    return 0


def end(out: Path, error: Exception) -> NoReturn:
    """Record and show the error that broke this rank, and end the process at once.

    Any thread may call it.

    Args:
        out: the folder in which `errors/rank<k>.txt` is written.
    """
    process.record_failure(out, number(), error)
    _show_failure(error, out, process.is_launchers(process.adopt_job()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2 if isinstance(error, UserError) else 1)


def show_user_error(error: UserError) -> None:
    """Print a user error on rank 0 alone: every rank finds the same one."""
    if number() == 0:
        print(error, file=sys.stderr, flush=True)
    else:
        time.sleep(USER_ERROR_WAIT_S)  # torchrun ends every rank as soon as one has ended


def _local_defaults() -> None:
    ranks_here = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = int(os.environ["WORLD_SIZE"]) // ranks_here
    for name, value in environment(ranks_here, nodes).items():
        os.environ.setdefault(name, value)


def _quieten_libraries() -> None:
    """Silence the libraries' warnings if no launcher redirects them to a file.

    They are some 100 lines a run: packages that are not installed, deprecations, and weights that
    vLLM's reload reports as failed although every sync reads them back. Variables that the user
    set are kept.
    """
    for name, value in (
        ("VLLM_LOGGING_LEVEL", "ERROR"),
        ("TORCH_CPP_LOG_LEVEL", "ERROR"),
        ("TORCH_LOGS", "-all"),
    ):
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", module=r"(megatron\.core|torch|vllm)\b")


def _show_failure(error: Exception, out: Path, launched: bool) -> None:
    if isinstance(error, UserError):
        show_user_error(error)
        return
    if launched:  # the launcher shows the earliest failure
        print(f"rank {number()} failed: {type(error).__name__}", file=sys.stderr)
        return
    first = process.first_failure(out)
    assert first is not None, "this rank has just recorded its own"
    # A rank that is killed records nothing; the first to record is a peer that lost it.
    what = _LOST_A_PEER if _BY_A_PEER.search(first.text) else "failed first:"
    print(f"rank {first.rank} {what}\n{first.text}", file=sys.stderr)
    if first.rank != number():
        print(f"rank {number()} then failed: {type(error).__name__}", file=sys.stderr)
    if line := folders.way_on(out):
        print(line, file=sys.stderr)
