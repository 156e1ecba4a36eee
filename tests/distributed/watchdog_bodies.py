"""What the ranks do in tests of the watchdog. Each public function runs on every rank."""

from __future__ import annotations

import os
import queue
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_precision.train.watchdog import HungJobError, Watchdog

LIMIT_S = 6.0


def one_stops(stopped: int, folder: str) -> None:
    """Rank `stopped` is stopped before the sync; another says so in `folder`."""
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    ended: queue.Queue[HungJobError] = queue.Queue()
    limits = {"sync": LIMIT_S, "train": 60.0}
    watchdog = Watchdog(limits, Path(folder, "alive"), rank, dist.get_world_size(), ended.put)
    watchdog.begin()
    with watchdog.phase(3, "train"):
        dist.barrier()
    if rank == stopped:
        time.sleep(5.0)  # its last post is of `other`
        os.kill(os.getpid(), signal.SIGSTOP)
    with watchdog.phase(3, "sync"):
        waits = dist.all_reduce(torch.zeros(1), async_op=True)
        error = ended.get(timeout=60.0)
    with open(os.path.join(folder, f"rank{rank}.txt"), "w", encoding="utf-8") as file:
        file.write(str(error))
    del waits
    os._exit(7)


def all_are_slow(folder: str) -> list[str]:
    """Every rank takes longer over its training than the limit; what rank 0 says."""
    dist.init_process_group("gloo")
    ended: queue.Queue[HungJobError] = queue.Queue()
    rank, size = dist.get_rank(), dist.get_world_size()
    watchdog = Watchdog({"train": 1.0}, Path(folder), rank, size, ended.put)
    with watchdog.phase(0, "rollout"):  # no limit
        time.sleep(6.0)
    within = ended.empty()
    with watchdog.phase(0, "train"):
        said = str(ended.get(timeout=60.0))
    watchdog.close()
    dist.barrier()
    return [str(within), said]
