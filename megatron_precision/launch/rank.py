"""One rank of a job: it ends with its parent, records what broke it, and never lingers."""

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
from megatron_precision.platform import process

# Longer than rank 0 needs to print, shorter than anybody waits.
USER_ERROR_WAIT_S = 3.0
# What gloo and NCCL say of a peer that is gone.
_BY_A_PEER = re.compile(r"Connection (closed|reset) by peer|ncclRemoteError")
_LOST_A_PEER = "lost a peer, which left no reason (torchrun's summary names one that was killed):"
_guards: list[process.Guard] = []


def number() -> int:
    """This process's global rank; 0 outside torchrun."""
    return int(os.environ.get("RANK", "0"))


def require_world(config: RunConfig, line: str) -> None:
    """Make sure that torchrun started as many processes as the layout has.

    A world of one needs no torchrun; its environment is filled in.

    Args:
        config: the resolved configuration.
        line: what to type instead.

    Raises:
        UserError: when the number of processes is another.
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
    """Fill the environment in as torchrun would for a single process."""
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
    """Start a world on this machine: torchrun takes this process's place.

    Args:
        words: the command line of every rank, after `python -m MODULE`.
        module: what every rank runs.
    """
    from megatron_precision.launch import environment

    sys.stdout.flush()
    os.execve(sys.executable, torchrun_line(ranks, words, module), os.environ | environment(ranks))


def torchrun_line(
    ranks: int, words: Sequence[str], module: str = "megatron_precision"
) -> list[str]:
    """A world on this machine; arguments as `become_launcher`'s."""
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    return [*line, str(ranks), "-m", module, *words]


def run(work: Callable[[], None], out: Path) -> int:
    """Do a rank's work.

    Args:
        work: the work; it imports the engines.
        out: where `errors/rank<k>.txt` is written when the work fails.

    Returns:
        0. A failure does not return: a rank whose peers wait in a collective can hang while the
        interpreter shuts down, so the process ends at once, with exit code 2 for a user error,
        75 where a signal stopped the run, and 1 for any other failure.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        process.die_with_parent()
    job = process.adopt_job()
    launched = process.is_launchers(job)
    _local_defaults()
    is_first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    if is_first_here and not launched:
        # By hand there is no launcher that removes the job's shared memory. The guard is kept
        # until the process ends: closed before, it would end the resource trackers, which Python
        # still needs to remove the segments of its own.
        _guards.append(process.Guard(job))
        if number() == 0:  # a later machine must not remove what a rank has recorded already
            shutil.rmtree(out / "errors", ignore_errors=True)  # of an earlier attempt
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
    """Record what broke this rank, show it, and end the process at once; from any thread.

    Args:
        out: where `errors/rank<k>.txt` is written.
    """
    process.record_failure(out, number(), error)
    _show_failure(error, out, process.is_launchers(process.adopt_job()))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(2 if isinstance(error, UserError) else 1)


def show_user_error(error: UserError) -> None:
    """Print a user error once a job; every rank finds the same one."""
    if number() == 0:
        print(error, file=sys.stderr, flush=True)
    else:
        time.sleep(USER_ERROR_WAIT_S)  # torchrun ends every rank as soon as one has ended


def _local_defaults() -> None:
    from megatron_precision.launch import environment

    ranks_here = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = int(os.environ["WORLD_SIZE"]) // ranks_here
    for name, value in environment(ranks_here, nodes).items():
        os.environ.setdefault(name, value)


def _quieten_libraries() -> None:
    """Keep the libraries' warnings off the console, where no launcher puts them into a file.

    Some 100 lines a run: what is not installed, what is deprecated, and weights that vLLM's
    reload calls failed, which every sync reads back. What the user has set stays.
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
    if launched:  # the launcher shows the first failure of all
        print(f"rank {number()} failed: {type(error).__name__}", file=sys.stderr)
        return
    first = process.first_failure(out)
    assert first is not None, "this rank has just recorded its own"
    # A rank that is killed records nothing, and the first to record is one that it left alone.
    what = _LOST_A_PEER if _BY_A_PEER.search(first.text) else "failed first:"
    print(f"rank {first.rank} {what}\n{first.text}", file=sys.stderr)
    if first.rank != number():
        print(f"rank {number()} then failed: {type(error).__name__}", file=sys.stderr)
    if line := folders.way_on(out):
        print(line, file=sys.stderr)
