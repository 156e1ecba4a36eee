"""A torchrun job without an engine, which ends as its first argument says.

It behaves as `megatron_precision train` does at the edges: it dies with its parent, records what
broke it, and owns shared memory:
a segment with the job's name, as the CPU build of vLLM has, and one of Python's own.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from megatron_precision.errors import Problem, UserError
from megatron_precision.platform import process


def main() -> None:
    ending, out = sys.argv[1], Path(sys.argv[-1])
    rank = int(os.environ["RANK"])
    process.die_with_parent()
    named = process.SHARED_MEMORY / f"tiny-{rank}-{process.adopt_job()}"
    named.write_bytes(b"segment")
    (out / f"named{rank}").write_text(str(named), encoding="utf-8")
    (out / f"pid{rank}").write_text(str(os.getpid()), encoding="ascii")
    python_segment = SharedMemory(create=True, size=16)
    (out / f"segment{rank}").write_text(python_segment.name, encoding="ascii")
    print(f"hello from rank {rank}", flush=True)
    while not (out / f"segment{1 - rank}").exists():
        time.sleep(0.02)
    try:
        if ending == "raise" and rank == 1:
            raise RuntimeError("the original reason")
        if ending == "refuse":
            raise UserError(Problem("not allowed", "here", "this", "that"))
    except (RuntimeError, UserError) as error:
        process.record_failure(out, rank, error)
        os._exit(1)
    if ending == "kill" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if ending == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if ending == "again" and int(os.environ.get("SLURM_RESTART_COUNT", "0")) > 0:
        return  # hanging until it was told to stop, and fine when it was started again
    if ending != "succeed":
        time.sleep(120)  # a peer that waits in a collective


if __name__ == "__main__":
    main()
