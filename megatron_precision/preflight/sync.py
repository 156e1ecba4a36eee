"""Plans a weight sync between two layouts, and prints what it moves.

Neither torch nor an engine is imported: a plan for a thousand ranks needs none of them.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_precision.sync.plan import Planner
from megatron_precision.sync.traffic import RankTraffic, Traffic, traffic


@dataclass(frozen=True)
class Rates:
    """Rates of one rank in one direction, in bytes a second.

    Attributes:
        inside: between ranks of a node (NVLink).
        network: between nodes (the rank's NIC).
    """

    inside: float
    network: float

    def seconds(self, rank: RankTraffic) -> float:
        """Predict the time of a rank's transfers: the busier direction of each link, added up.

        Waiting and packing are not counted.
        """
        near = max(rank.received - rank.from_network, rank.sent - rank.to_network)
        return near / self.inside + max(rank.from_network, rank.to_network) / self.network


def run(planner: Planner, itemsize: int, batch_bytes: int, rates: Rates, as_json: bool) -> int:
    """Plan a sync and print what it moves, as a table or as JSON.

    Args:
        itemsize: bytes of an element on the wire.
        batch_bytes: largest size of a message.

    Returns:
        The exit code 0.
    """
    found = traffic(planner, itemsize, batch_bytes)
    if as_json:
        values = dataclasses.asdict(found) | {
            "trainer": dataclasses.asdict(planner.trainer),
            "rollout": dataclasses.asdict(planner.rollout),
            "seconds": {rank.rank: rates.seconds(rank) for rank in found.ranks},
        }
        print(json.dumps(values, indent=1))
        return 0
    for line in _table(planner, found, batch_bytes, rates):
        print(line)
    return 0


def _table(planner: Planner, found: Traffic, batch_bytes: int, rates: Rates) -> Iterator[str]:
    ranks = len({*planner.trainer.world, *planner.rollout.world})
    unit, size = _unit(found.model_bytes)
    yield f"{sized(found.model_bytes)} of weights, {ranks} rank{'s' * (ranks > 1)}"
    yield from describe(planner)
    if len(found.ranks) < ranks:
        yield f"(ranks of the first and the last node: {len(found.ranks)} of {ranks})"
    yield ""
    yield (
        f"{'rank':>6}{'copied':>10}{'received':>10}{'bound':>10}{'network':>10}{'sent':>10}"
        f"{'messages':>10}{'peers':>7}{'planned':>10}{'predicted':>11}"
    )
    yield f"{'':>6}{unit:>10}{unit:>10}{unit:>10}{unit:>10}{unit:>10}"
    for rank in found.ranks if len(found.ranks) <= 32 else _extremes(found.ranks):
        yield (
            f"{rank.rank:>6}{rank.copied / size:>10.3f}{rank.received / size:>10.3f}"
            f"{rank.received_bound / size:>10.3f}{rank.from_network / size:>10.3f}"
            f"{rank.sent / size:>10.3f}{rank.messages:>10}{rank.peers:>7}{rank.plan_s:>8.2f} s"
            f"{1e3 * rates.seconds(rank):>8.1f} ms"
        )
    yield ""
    received = sum(rank.received for rank in found.ranks)
    bound = sum(rank.received_bound for rank in found.ranks)
    yield f"received ÷ lower bound, all ranks    {_ratio(received, bound)}"
    for node, (entered, least) in sorted(found.network.items()):
        if least:
            yield f"over the network ÷ lower bound, node {node:<3} {_ratio(entered, least)}"
    entered_at = [rank.from_network for rank in found.ranks if rank.from_network]
    if entered_at:
        busiest = max(entered_at) * len(entered_at) / sum(entered_at)
        yield f"entering by the busiest NIC ÷ mean   {busiest:.3f}"
    trainers = planner.trainer.world
    sent = [rank.sent for rank in found.ranks if rank.rank in trainers]
    handed_on = [rank.sent for rank in found.ranks if rank.rank not in trainers]
    for who, sizes in (
        ("sent by the busiest trainer", sent),
        ("handed on by an engine", handed_on),
    ):
        if any(sizes):
            yield f"{who + ' ÷ mean':<37}{max(sizes) * len(sizes) / sum(sizes):.3f}"
    yield f"buffers                              {2 * batch_bytes / 2**20:.0f} MiB a rank"
    slowest = max(rates.seconds(rank) for rank in found.ranks)
    yield (
        f"predicted                            {1e3 * slowest:.1f} ms at {rates.inside / 1e9:g} "
        f"GB/s inside a node and {rates.network / 1e9:g} GB/s between nodes"
    )


def describe(planner: Planner) -> Iterator[str]:
    """Describe both layouts, one line each."""
    t, r = planner.trainer, planner.rollout
    sizes = {"tp": t.tp, "pp": t.pp, "dp": t.size // (t.tp * t.pp)}
    if planner.model.num_experts:
        sizes |= {"ep": t.ep, "etp": t.etp}
    yield f"trainer  {_sizes(sizes)}   ranks {_span(t.world)}"
    sizes = {"tp": r.tp, "dp": r.size // r.tp} | ({"ep": r.tp} if r.expert_parallel else {})
    yield f"engines  {_sizes(sizes)}   ranks {_span(r.world)}"


def _sizes(sizes: dict[str, int]) -> str:
    return ",".join(f"{name}={size}" for name, size in sizes.items())


def _span(ranks: range) -> str:
    return str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def sized(count: int) -> str:
    """Format bytes in KiB, MiB or GiB."""
    unit, size = _unit(count)
    return f"{count / size:.2f} {unit}"


def _unit(most: int) -> tuple[str, int]:
    """Return the name and the bytes of the largest unit that is at most `most`."""
    units = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
    return next(((name, size) for name, size in units.items() if most >= size), ("KiB", 2**10))


def _extremes(ranks: list[RankTraffic]) -> list[RankTraffic]:
    """Choose the first and last rank, and those that receive most, send most and plan longest."""
    chosen = {
        max(ranks, key=lambda r: r.received).rank: 0,
        max(ranks, key=lambda r: r.sent).rank: 0,
        max(ranks, key=lambda r: r.plan_s).rank: 0,
        ranks[0].rank: 0,
        ranks[-1].rank: 0,
    }
    return [rank for rank in ranks if rank.rank in chosen]


def _ratio(value: float, least: float) -> str:
    return f"{value / least:.3f}" if least else ("1.000" if not value else "more than nothing")
