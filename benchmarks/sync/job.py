"""The processes that carry a plan out, and what they say."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import psutil

from benchmarks.sync.parameters import engine_parameters, trainer_parameters
from megatron_precision.config.errors import Problem, UserError
from megatron_precision.launch import rank
from megatron_precision.precision.policy import DType
from megatron_precision.preflight.sync import describe, sized
from megatron_precision.sync.plan import Planner

if TYPE_CHECKING:
    from benchmarks.sync.measure import Execution


# Of Python and torch.
_PROCESS_BYTES = 2**29


@dataclasses.dataclass(frozen=True)
class Bench:
    """What is measured.

    Attributes:
        rounds: of each way, in turn.
        as_json: print the raw figures.
    """

    planner: Planner
    wire: DType
    batch_bytes: int
    rounds: int
    as_json: bool

    @property
    def ranks(self) -> int:
        """Processes."""
        return len({*self.planner.trainer.world, *self.planner.rollout.world})


def run(bench: Bench, words: Sequence[str]) -> int:
    """Start the world on this machine, or take part in the one that torchrun has started.

    Args:
        words: the command line, for the processes of a world that is started here.

    Returns:
        The exit code; where a world is started, its launcher takes this process's place.

    Raises:
        UserError: for a world of another size, or weights that do not fit into memory.
    """
    found = int(os.environ.get("WORLD_SIZE", "0"))
    if found not in (0, bench.ranks):
        raise UserError(
            Problem(
                "these layouts need another number of processes", "WORLD_SIZE", str(found),
                str(bench.ranks), "without torchrun, the command starts them itself",
            )
        )  # fmt: skip
    if not found:
        _require_memory(bench)
        if bench.ranks > 1:
            rank.become_launcher(bench.ranks, words, module="benchmarks.sync")
        rank.become_world_of_one()
    port = os.environ["MASTER_PORT"]
    errors = Path(tempfile.gettempdir()) / f"megatron-precision-sync-bench-{port}"
    return rank.run(lambda: _work(bench), errors)


def _require_memory(bench: Bench) -> None:
    """Refuse weights that this machine cannot hold; on a GPU they would lie elsewhere.

    Raises:
        UserError: says what they take.
    """
    if Path("/dev/nvidiactl").exists():
        return
    planner, itemsize = bench.planner, 4 if bench.wire == "fp32" else 2
    model = planner.model
    trainers = (trainer_parameters(model, planner.trainer, r) for r in planner.trainer.world)
    engines = (engine_parameters(model, planner.rollout, r) for r in planner.rollout.world)
    held = [parameter for rank_held in (*trainers, *engines) for parameter in rank_held]
    weights = itemsize * sum(math.prod(parameter.shape) for parameter in held)
    # A gathered parameter, the source of the plain copy and both messages, on each rank.
    largest = itemsize * max(math.prod(parameter.shape) for parameter in held)
    gathered = largest * planner.trainer.tp
    wanted = weights + bench.ranks * (gathered + largest + 2 * bench.batch_bytes + _PROCESS_BYTES)
    there = psutil.virtual_memory().available
    if wanted > there:
        gib = 2**30
        raise UserError(
            Problem(
                "the weights do not fit into this machine's memory", "--model",
                f"{wanted / gib:.1f} GiB for {bench.ranks} ranks", f"up to {there / gib:.1f} GiB",
                "--layers and --vocab-rows make a smaller model of the same shape",
            )
        )  # fmt: skip


def _work(bench: Bench) -> None:
    import torch
    import torch.distributed as dist

    from benchmarks.sync import measure
    from megatron_precision.precision.dtypes import torch_dtype

    local = int(os.environ["LOCAL_RANK"])
    # Ranks that share a GPU cannot talk by NCCL.
    cuda = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
    if cuda:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo")
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    found = measure.run(
        bench.planner, torch_dtype(bench.wire), bench.batch_bytes, bench.rounds, device
    )
    if rank.number() == 0:
        if bench.as_json:
            values = {
                "trainer": dataclasses.asdict(bench.planner.trainer),
                "rollout": dataclasses.asdict(bench.planner.rollout),
                "model": dataclasses.asdict(bench.planner.model),
            }
            print(json.dumps(values | dataclasses.asdict(found), indent=1))
        else:
            print("\n".join(lines(bench.planner, found)))
    dist.barrier()
    dist.destroy_process_group()  # gloo's threads may not outlive it


def lines(planner: Planner, found: Execution) -> Iterator[str]:
    """The figures for a person: medians over the rounds, of the slowest rank."""
    yield f"{found.ranks} processes on {found.device}"
    yield f"up to {sized(found.engine_bytes)} of engine weights a process"
    yield from describe(planner)
    yield ""
    yield f"{'':<14}{'median':>12}{'÷ copy':>10}{'received':>14}{'memory above weights':>24}"
    copy = statistics.median(found.seconds["memory copy"])
    for name, seconds in found.seconds.items():
        median = statistics.median(seconds)
        received = sized(found.received[name]) if name in found.received else ""
        extra = sized(found.extra_bytes[name]) if name in found.extra_bytes else ""
        yield f"{name:<14}{1e3 * median:>9.1f} ms{median / copy:>10.2f}{received:>14}{extra:>24}"
    yield ""
    pairs = zip(found.seconds["full gather"], found.seconds["by plan"], strict=True)
    faster = statistics.median(gather / plan for gather, plan in pairs)
    yield f"by plan {faster:.2f} × as fast as the full gather, median of {found.rounds} rounds"
    yield (
        f"planned in {found.plan_s:.2f} s, bound in {found.bind_s:.2f} s, again in "
        f"{found.rebind_s:.2f} s; {found.regions} regions proven equal, whichever way they came"
    )
