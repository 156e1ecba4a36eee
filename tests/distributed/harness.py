"""Run a function on real processes with gloo, as torchrun would start them.

The processes are forked from one that has imported what is not under test (`preloaded.py`).
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import multiprocessing
import os
import pickle
import random
import socket
import sys
import tempfile
import time
import uuid
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_precision.platform.process import die_with_parent

ROOT = Path(__file__).resolve().parents[2]
_COMMON = {
    "PYTHONPATH": str(ROOT),
    "OMP_NUM_THREADS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
    "VLLM_HOST_IP": "127.0.0.1",
    # Whether there is a GPU is asked without starting CUDA: ranks are forked.
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    # A failed rank's message is to be found in its log.
    "PYTHONWARNINGS": "ignore",
}


def free_port() -> int:
    """Find a port that nobody listens on, outside the range from which the kernel gives others.

    A port from within that range can be taken by any connection before the rank binds it.
    """
    while True:
        port = random.SystemRandom().randrange(12_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def run_distributed(body: str, world_size: int, *args: Any, timeout_s: float = 400) -> Any:
    """Call `module.function(*args)` on every rank of a new world; returns what rank 0 returned.

    Args:
        body: `module.function`, a module beside this file.
        args: anything that pickles.
        timeout_s: for the world as a whole.

    Raises:
        AssertionError: with every rank's output, where a rank failed or time ran out.
    """
    job = f"test-{uuid.uuid4().hex[:8]}"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "args.pkl").write_bytes(pickle.dumps(args))
        common = {
            **os.environ,
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "MEGATRON_PRECISION_JOB": job,
            **_COMMON,
        }
        processes: list[BaseProcess] = []
        for rank in range(world_size):
            variables = {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(_ranks().Process(target=_rank, args=(body, folder, variables)))
            processes[-1].start()
        codes = _wait(processes, timeout_s)
        for leftover in Path("/dev/shm").glob(f"*{job}*"):
            leftover.unlink()
        texts = [
            Path(folder, f"rank{rank}.log").read_text(errors="replace")[-6000:]
            for rank in range(world_size)
        ]
        logs = "\n".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(texts))
        assert all(code == 0 for code in codes), f"{body} on {world_size} ranks: {codes}\n{logs}"
        return pickle.loads(Path(folder, "result.pkl").read_bytes())


@functools.cache
def _ranks() -> ForkServerContext:
    """Starts ranks as forks of one process, which imports `preloaded` first and ends with us."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.preloaded"])
    # What is read when PyTorch and its BLAS are imported must be there by then.
    with mock.patch.dict(os.environ, _COMMON):
        forkserver.ensure_running()
    return context


def stop_server() -> None:
    """End the process that ranks are forked from, for tests of what forks from a server of its own;
    the next rank starts another."""
    vars(forkserver)["_forkserver"]._stop()
    _ranks.cache_clear()


def _wait(processes: list[BaseProcess], timeout_s: float) -> list[int]:
    """Exit codes in order; when one rank fails its peers wait for it in vain and are ended."""
    deadline = time.monotonic() + timeout_s
    try:
        while (running := [p for p in processes if p.exitcode is None]) and (
            time.monotonic() < deadline
        ):
            if any(process.exitcode not in (None, 0) for process in processes):
                # The peer's own message is worth a moment.
                deadline = min(deadline, time.monotonic() + 5.0)
            running[0].join(timeout=0.5)
        return [-1 if process.exitcode is None else process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _rank(body: str, folder: str, variables: dict[str, str]) -> None:
    """A rank's own process; like a rank of torchrun it has its environment, folder and log."""
    # A killed pytest must leave no rank behind.
    die_with_parent()
    with open(Path(folder, f"rank{variables['RANK']}.log"), "wb") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    os.environ.clear()
    os.environ.update(variables)
    sys.path.insert(0, str(ROOT))
    os.chdir(folder)
    module, _, function = body.rpartition(".")
    args = pickle.loads(Path(folder, "args.pkl").read_bytes())
    result = getattr(importlib.import_module(f"tests.distributed.{module}"), function)(*args)
    if variables["RANK"] == "0":
        Path(folder, "result.pkl").write_bytes(pickle.dumps(result))
    # multiprocessing ends without these, and engines remove shared memory in them.
    atexit._run_exitfuncs()
