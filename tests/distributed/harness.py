"""Run a function of `bodies.py` on real processes with gloo, as torchrun would start them."""

from __future__ import annotations

import importlib
import os
import pickle
import socket
import subprocess
import sys
import tempfile
import uuid
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_distributed(body: str, world_size: int, *args: Any, timeout_s: float = 240) -> Any:
    """Call `bodies.body(*args)` on every rank of a new world; returns what rank 0 returned.

    Raises:
        AssertionError: with every rank's output, where a rank failed or time ran out.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "args.pkl").write_bytes(pickle.dumps(args))
        common = {
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests' / 'distributed'}",
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "MEGATRON_PRECISION_JOB": uuid.uuid4().hex[:8],
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        processes = []
        for rank in range(world_size):
            log = Path(folder, f"rank{rank}.log").open("wb")
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(Path(__file__)), body, folder],
                    env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
            )
        try:
            codes = [process.wait(timeout=timeout_s) for process in processes]
        except subprocess.TimeoutExpired:
            codes = [-1]
        finally:
            for process in processes:
                process.kill()
                process.wait()
            for leftover in Path("/dev/shm").glob(f"*{common['MEGATRON_PRECISION_JOB']}*"):
                leftover.unlink()
        logs = "\n".join(
            f"--- rank {rank}\n{Path(folder, f'rank{rank}.log').read_text(errors='replace')[-6000:]}"
            for rank in range(world_size)
        )
        assert all(code == 0 for code in codes), f"{body} on {world_size} ranks: {codes}\n{logs}"
        return pickle.loads(Path(folder, "result.pkl").read_bytes())


def main() -> None:
    body, folder = sys.argv[1:]
    args = pickle.loads(Path(folder, "args.pkl").read_bytes())
    module = importlib.import_module("bodies")
    result = getattr(module, body)(*args)
    if os.environ["RANK"] == "0":
        Path(folder, "result.pkl").write_bytes(pickle.dumps(result))


if __name__ == "__main__":
    main()
