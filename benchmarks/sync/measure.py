"""A sync on real processes: by plan, with its proof, against a full gather and a plain copy.

Weights are made up, in the shapes and the layouts of the real ones. Every way is run in turn in
every round, so that a noisy machine slows all of them, and times are those of the slowest rank.
"""

from __future__ import annotations

import contextlib
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.sync.full_gather import FullGather
from benchmarks.sync.parameters import engine_coordinates, engine_parameters, trainer_parameters
from megatron_precision.layouts.megatron import ShardCoordinates
from megatron_precision.layouts.regions import Region
from megatron_precision.sync.plan import Planner, rank_groups
from megatron_precision.sync.transfer import Transfer

COPY, PLANNED, GATHER = "memory copy", "by plan", "full gather"
# The proof, and of it what travels: the checksums themselves are of the trainer's memory and the
# engine's, wherever these are.
PROOF, COMPARISON = "proof", "sums compared"


@dataclass(frozen=True)
class Execution:
    """What a world measured.

    Attributes:
        ranks: processes.
        rounds: of each way.
        device: the first rank's.
        engine_bytes: of the rank whose engine is largest.
        seconds: way → seconds of each round, of the slowest rank.
        received: way → bytes that the busiest rank received from others.
        extra_bytes: way → how far memory rose above the weights, buffers included; largest rank.
        plan_s, bind_s, rebind_s: to plan, to bind the plan to tensors, and to bind it again, of the
        slowest rank.
        regions: compared by each proof, over all ranks.
    """

    ranks: int
    rounds: int
    device: str
    engine_bytes: int
    seconds: dict[str, list[float]]
    received: dict[str, int]
    extra_bytes: dict[str, int]
    plan_s: float
    bind_s: float
    rebind_s: float
    regions: int


@dataclass(frozen=True)
class _Parameter:
    """An engine's parameter that is written in place."""

    name: str
    live: torch.Tensor
    staged: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.live.shape)


@dataclass(frozen=True)
class _Engine:
    """An engine whose kernels read its parameters as they were loaded, as a GPU's do."""

    parameters: list[_Parameter]
    tensors: dict[str, torch.Tensor] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "tensors", {p.name: p.live for p in self.parameters})

    def load(self, staged: Mapping[str, torch.Tensor]) -> None:
        if staged:
            raise ValueError("nothing is staged here")

    def refresh_tied_head(self) -> None:
        """The head is the embedding."""

    def reads(self, name: str) -> list[torch.Tensor]:
        return [self.tensors[name]]


class SyncDiffersError(RuntimeError):
    """A way of syncing did not bring the trainer's weights."""


def run(
    planner: Planner,
    wire: torch.dtype,
    batch_bytes: int,
    rounds: int,
    device: torch.device,
) -> Execution:
    """Measure on this world; every rank calls it.

    Raises:
        SyncDiffersError: where the plan or the gather left another weight than the trainer's.
    """
    rank = dist.get_rank()
    sources, weights = _trainer(planner, rank, wire, device)
    engine = _engine(planner, rank, wire, device)
    tensors = engine.tensors if engine else {}
    at = engine_coordinates(planner.model, planner.rollout, rank) if engine else ShardCoordinates()

    def bind() -> Transfer:
        return Transfer(
            planner, sources, engine, at, wire=wire, dtype=wire, batch_bytes=batch_bytes
        )

    with _memory_rise(device) as plan_rise:
        plan_s = _seconds(lambda: rank_groups(planner, rank))
        begin = time.perf_counter()
        transfer = bind()
        bind_s = time.perf_counter() - begin
        transfer.run()
    regions = _require_equal(transfer, PLANNED)
    rebind_s = _seconds(bind)
    for tensor in tensors.values():
        tensor.zero_()
    targets = [
        (region, tensors[parameter.name])
        for parameter in (engine_parameters(planner.model, planner.rollout, rank) if engine else ())
        for region in parameter.regions
    ]
    with _memory_rise(device) as gather_rise:
        gather = FullGather(planner, weights, targets, wire=wire, device=device)
        gather.run()
    _require_equal(transfer, GATHER)
    held = transfer.proof.held()
    ways = {
        COPY: _plain_copy(list(tensors.values())),
        PLANNED: transfer.run,
        PROOF: transfer.prove,
        COMPARISON: lambda: transfer.proof.arrived(held),
        GATHER: gather.run,
    }
    return Execution(
        ranks=dist.get_world_size(),
        rounds=rounds,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        engine_bytes=_most(sum(tensor.nbytes for tensor in tensors.values())),
        seconds=_rounds(ways, rounds),
        received={
            PLANNED: _most(transfer.transport.received_bytes),
            GATHER: _most(gather.received),
        },
        extra_bytes={PLANNED: _most(plan_rise[0]), GATHER: _most(gather_rise[0])},
        plan_s=_most_s(plan_s),
        bind_s=_most_s(bind_s),
        rebind_s=_most_s(rebind_s),
        regions=regions,
    )


def _rounds(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each way and round, of the slowest rank."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            dist.barrier()
            found[name].append(_most_s(_seconds(way)))
    return found


def _trainer(
    planner: Planner, rank: int, dtype: torch.dtype, device: torch.device
) -> tuple[list[tuple[Region, torch.Tensor]], dict[str, torch.Tensor]]:
    """A rank's regions and parameters; a box has the same numbers wherever it is held."""
    if rank not in planner.trainer.world:
        return [], {}
    regions, weights = [], {}
    for parameter in trainer_parameters(planner.model, planner.trainer, rank):
        tensor = torch.zeros(parameter.shape, dtype=dtype, device=device)
        for region in parameter.regions:
            seed = zlib.crc32(f"{region.hf_name} {region.start}".encode())
            generator = torch.Generator(device).manual_seed(seed)
            tensor.view(region.view)[region.spans].uniform_(-1, 1, generator=generator)
            regions.append((region, tensor))
        weights[parameter.name] = tensor
    return regions, weights


def _engine(
    planner: Planner, rank: int, dtype: torch.dtype, device: torch.device
) -> _Engine | None:
    if rank not in planner.rollout.world:
        return None
    return _Engine(
        [
            # Ones, and not empty: memory that is not there yet would count as the sync's.
            _Parameter(parameter.name, torch.ones(parameter.shape, dtype=dtype, device=device))
            for parameter in engine_parameters(planner.model, planner.rollout, rank)
        ]
    )


def _require_equal(transfer: Transfer, way: str) -> int:
    """Prove what a way has left; the regions of all ranks.

    Raises:
        SyncDiffersError: naming the first regions that differ here.
    """
    proof = transfer.prove()
    if proof.differing:
        lines = "\n  ".join(proof.differing[:10])
        raise SyncDiffersError(f"{way}: {len(proof.differing)} regions differ\n  {lines}")
    return int(_reduced(proof.regions, dist.ReduceOp.SUM))


def _plain_copy(tensors: list[torch.Tensor]) -> Callable[[], None]:
    """Copies as many bytes as the engine has, from a buffer as large as its largest parameter."""
    source = torch.cat([max(tensors, key=torch.Tensor.nelement).flatten()]) if tensors else None

    def copy() -> None:
        for tensor in tensors:
            assert source is not None
            tensor.view(-1).copy_(source[: tensor.numel()])

    return copy


def _seconds(way: Callable[[], object]) -> float:
    begin = time.perf_counter()
    way()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


@contextlib.contextmanager
def _memory_rise(device: torch.device) -> Iterator[list[int]]:
    """By how many bytes this rank's memory rose above what it was, at most."""
    found: list[int] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        yield found
        found.append(torch.cuda.max_memory_allocated() - before)
        return
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM, see proc(5)
    before = _status_bytes("VmRSS")
    yield found
    found.append(_status_bytes("VmHWM") - before)


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


def _most(value: int) -> int:
    return int(_reduced(value, dist.ReduceOp.MAX))


def _most_s(seconds: float) -> float:
    return _reduced(seconds, dist.ReduceOp.MAX)


def _reduced(value: float, operation: Any) -> float:
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    tensor = torch.tensor(value, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, operation)
    return float(tensor)
