"""A torchrun job without an engine, which ends as its first argument says.

It is a rank as `megatron_precision train` is one (`rank.run`), and owns shared memory: a segment
with the job's name, as the CPU build of vLLM has, and one of Python's own.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from multiprocessing.shared_memory import SharedMemory
from pathlib import Path

from megatron_precision.config.errors import Problem, UserError
from megatron_precision.launch import rank
from megatron_precision.platform import process


def main() -> int:
    ending, out = sys.argv[1], Path(sys.argv[-1])
    return rank.run(lambda: work(ending, out, rank.number()), out)


def work(ending: str, out: Path, number: int) -> None:
    # As with an engine, shared memory is made once the ranks have met, and so after the guard.
    start = sum(
        int(os.environ.get(name, "0")) for name in ("SLURM_RESTART_COUNT", "EARLIER_ARRAY_TASKS")
    )
    (out / f"here{number}.{start}").touch()
    while not (out / f"here{1 - number}.{start}").exists():
        time.sleep(0.02)
    named = process.SHARED_MEMORY / f"tiny-{number}-{process.adopt_job()}"
    named.write_bytes(b"segment")
    (out / f"named{number}").write_text(str(named), encoding="utf-8")
    (out / f"pid{number}").write_text(str(os.getpid()), encoding="ascii")
    python_segment = SharedMemory(create=True, size=16)
    (out / f"segment{number}").write_text(python_segment.name, encoding="ascii")
    print(f"hello from rank {number}", flush=True)
    while not (out / f"segment{1 - number}").exists():
        time.sleep(0.02)
    if ending == "raise" and number == 1:
        raise RuntimeError("the original reason")
    if ending == "refuse":
        raise UserError(Problem("not allowed", "here", "this", "that"))
    if ending == "kill" and number == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if ending == "stubborn":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if ending == "again" and start > 0:
        return  # it hung until it was told to stop, and is fine when it is started again
    if ending == "secrets":
        for name in ("NAMED_SECRET", "OTHER_SECRET"):
            (out / name).write_text(str(name in os.environ), encoding="ascii")
        return
    if ending != "succeed":
        time.sleep(120)  # a peer that waits in a collective


if __name__ == "__main__":
    sys.exit(main())
