"""Run a function on real processes with gloo, as torchrun would start them."""

from __future__ import annotations

import contextlib
import importlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from megatron_precision.platform.process import die_with_parent

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        Path(folder, "args.pkl").write_bytes(pickle.dumps(args))
        common = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{HERE}",
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "MEGATRON_PRECISION_JOB": job,
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
            "VLLM_HOST_IP": "127.0.0.1",
            # A failed rank's message is to be found in its log.
            "PYTHONWARNINGS": "ignore",
        }
        processes = []
        for rank in range(world_size):
            log = stack.enter_context(Path(folder, f"rank{rank}.log").open("wb"))
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(Path(__file__)), body, folder],
                    env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    cwd=folder,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
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


def _wait(processes: list[subprocess.Popen[bytes]], timeout_s: float) -> list[int]:
    """Exit codes in order; when one rank fails its peers wait for it in vain and are ended."""
    deadline = time.monotonic() + timeout_s
    try:
        while (running := [p for p in processes if p.poll() is None]) and (
            time.monotonic() < deadline
        ):
            if any(process.poll() not in (None, 0) for process in processes):
                # The peer's own message is worth a moment.
                deadline = min(deadline, time.monotonic() + 5.0)
            with contextlib.suppress(subprocess.TimeoutExpired):
                running[0].wait(timeout=0.5)
        return [-1 if process.poll() is None else process.returncode for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    # A killed pytest must leave no rank behind.
    die_with_parent()
    body, folder = sys.argv[1:]
    module, _, function = body.rpartition(".")
    args = pickle.loads(Path(folder, "args.pkl").read_bytes())
    result = getattr(importlib.import_module(module), function)(*args)
    if os.environ["RANK"] == "0":
        Path(folder, "result.pkl").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main()
