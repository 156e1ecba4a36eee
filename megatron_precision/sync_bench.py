"""`sync-bench`: what a weight sync moves between two layouts, planned on the spot.

Neither torch nor an engine is loaded: a plan for a thousand ranks needs none of them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_precision.config import ModelConfig
from megatron_precision.errors import Problem, UserError, nearest
from megatron_precision.weights.families import RolloutLayout, TrainerLayout
from megatron_precision.weights.hf_config import read_model
from megatron_precision.weights.known_models import KNOWN_MODELS
from megatron_precision.weights.plan import CELL_ELEMENTS, Planner
from megatron_precision.weights.traffic import RankTraffic, Traffic, traffic
from megatron_precision.weights.vllm_layout import padded_vocab_rows

TRAIN_SIZES = ("tp", "pp", "ep", "etp", "dp")
ROLLOUT_SIZES = ("tp", "dp", "ep")


@dataclass(frozen=True)
class Rates:
    """Of one rank, one way, in bytes a second.

    Attributes:
        inside: between ranks of a node (NVLink).
        network: between nodes (its NIC).
    """

    inside: float
    network: float

    def seconds(self, rank: RankTraffic) -> float:
        """The time of a rank that neither waits nor packs: the larger way of either link."""
        near = max(rank.received - rank.from_network, rank.sent - rank.to_network)
        return near / self.inside + max(rank.from_network, rank.to_network) / self.network


def model_of(name: str) -> ModelConfig:
    """A known model, or that of a Hugging Face folder.

    Raises:
        UserError: where it is neither.
    """
    if name in KNOWN_MODELS:
        return KNOWN_MODELS[name]
    if Path(name).is_dir():
        return read_model(Path(name) / "config.json")
    close = nearest(name, list(KNOWN_MODELS))
    raise UserError(
        Problem(
            "unknown model", "--model", name, f"one of {', '.join(KNOWN_MODELS)}, or a folder",
            f"did you mean {close[0]}?" if close else "",
        )
    )  # fmt: skip


def planner_of(
    model: ModelConfig,
    train: str,
    rollout: str,
    world: int | None,
    ranks_per_node: int,
    apart: bool,
    cell_elements: int = CELL_ELEMENTS,
) -> Planner:
    """The planner of two layouts as a user writes them.

    Args:
        train: for example `tp=8,pp=2`; data parallelism fills the world unless `dp` is given.
        rollout: for example `tp=2,dp=4`; `ep`, equal to `tp`, gives each rank whole experts.
        world: ranks of either side; by default what the trainer's sizes make.
        apart: the engines have ranks of their own, after the trainer's.

    Raises:
        UserError: lists every size that is unknown or does not divide.
    """
    problems: list[Problem] = []
    t = _sizes("--train", train, TRAIN_SIZES, problems)
    r = _sizes("--rollout", rollout, ROLLOUT_SIZES, problems)
    if problems:
        raise UserError(problems)
    grid = math.lcm(t["tp"] * t["pp"], t["ep"] * t["etp"] * t["pp"])
    made = t["tp"] * t["pp"] * t["dp"], r["tp"] * r["dp"]
    size = world or (made[0] if "dp=" in train else grid)
    engines = world or (made[1] if "dp=" in rollout else size)
    for option, text, ranks, known in (
        ("--train", train, made[0], size),
        ("--rollout", rollout, made[1], engines),
    ):
        if "dp=" in text and ranks != known:
            problems.append(
                Problem("sizes that make another world", option, str(ranks), str(known))
            )
    problems += _indivisible(model, t, r, size, engines)
    if not apart and engines != size:
        problems.append(
            Problem(
                "trainer and engines share their ranks", "--train, --rollout",
                f"{size} and {engines} ranks", "as many", "--apart gives each its own",
            )
        )  # fmt: skip
    if problems:
        raise UserError(problems)
    return Planner(
        model,
        TrainerLayout(size, t["tp"], t["pp"], t["ep"], t["etp"]),
        RolloutLayout(engines, r["tp"], r["ep"] > 1, size if apart else 0),
        ranks_per_node,
        cell_elements,
    )


def _sizes(
    option: str, text: str, known: tuple[str, ...], problems: list[Problem]
) -> dict[str, int]:
    found = dict.fromkeys(known, 1)
    for part in filter(None, text.split(",")):
        name, _, value = part.partition("=")
        if name not in known or not value.isdecimal() or int(value) < 1:
            expected = f"{', '.join(known)} = a positive number, joined by commas"
            problems.append(Problem("not a layout", option, part, expected))
            continue
        found[name] = int(value)
    return found


def _indivisible(
    model: ModelConfig, t: dict[str, int], r: dict[str, int], size: int, engines: int
) -> Iterator[Problem]:
    kv_heads, experts = model.num_key_value_heads, model.num_experts
    inner = model.moe_intermediate_size if experts else model.intermediate_size
    sizes = [
        ("--train tp", "KV heads", kv_heads, t["tp"]),
        ("--train pp", "layers", model.num_hidden_layers, t["pp"]),
        ("--train tp × pp", "ranks", size, t["tp"] * t["pp"]),
        ("--train ep × etp × pp", "ranks", size, t["ep"] * t["etp"] * t["pp"]),
        ("--rollout tp", "attention heads", model.num_attention_heads, r["tp"]),
        ("--rollout tp", "ranks", engines, r["tp"]),
        ("--rollout tp", "rows of the vocabulary", padded_vocab_rows(model), r["tp"]),
    ]
    if experts:
        sizes += [
            ("--train ep", "experts", experts, t["ep"]),
            ("--train etp", "MLP", inner, t["etp"]),
        ]
        part = ("experts", experts) if r["ep"] > 1 else ("the experts' MLP", inner)
        sizes.append(("--rollout tp", *part, r["tp"]))
    else:
        sizes += [("--train tp", "MLP", inner, t["tp"]), ("--rollout tp", "MLP", inner, r["tp"])]
        if t["ep"] * t["etp"] > 1:
            yield Problem("a dense model has no experts", "--train ep, etp", "more than 1", "1")
    for where, what, count, by in sizes:
        if count % by:
            yield Problem(
                f"{what} do not divide", where, f"{count} / {by}", f"a divisor of {count}"
            )
    if r["ep"] > 1 and (r["ep"] != r["tp"] or not experts):
        expected = "1, or tp" if experts else "1 for a dense model"
        yield Problem(
            "experts are divided over an engine's ranks", "--rollout ep", str(r["ep"]), expected
        )
    if kv_heads % r["tp"] and r["tp"] % kv_heads:
        yield Problem(
            "KV heads neither divide nor are divided", "--rollout tp", f"{kv_heads} and {r['tp']}",
            "a divisor or a multiple",
        )  # fmt: skip


def refuse_numbers(**options: float | None) -> None:
    """Raise a UserError that lists every option that is not above zero; None is not given."""
    problems = [
        Problem("not above zero", "--" + name.replace("_", "-"), f"{value:g}", "a positive number")
        for name, value in options.items()
        if value is not None and value <= 0
    ]
    if problems:
        raise UserError(problems)


def run(planner: Planner, itemsize: int, message_bytes: int, rates: Rates, as_json: bool) -> int:
    """Plan, and print what it moves."""
    found = traffic(planner, itemsize, message_bytes)
    if as_json:
        values = dataclasses.asdict(found) | {
            "trainer": dataclasses.asdict(planner.trainer),
            "rollout": dataclasses.asdict(planner.rollout),
            "seconds": {rank.rank: rates.seconds(rank) for rank in found.ranks},
        }
        print(json.dumps(values, indent=1))
        return 0
    for line in _table(planner, found, message_bytes, rates):
        print(line)
    return 0


def _table(planner: Planner, found: Traffic, message_bytes: int, rates: Rates) -> Iterator[str]:
    gib = 2**30
    ranks = len({*planner.trainer.world, *planner.rollout.world})
    yield f"{found.model_bytes / gib:.2f} GiB of weights, {ranks} ranks, {planner.trainer}"
    yield f"to {planner.rollout}"
    if len(found.ranks) < ranks:
        yield f"(ranks of the first and the last node: {len(found.ranks)} of {ranks})"
    yield ""
    yield (
        f"{'rank':>6}{'copied':>10}{'received':>10}{'bound':>10}{'network':>10}{'sent':>10}"
        f"{'messages':>10}{'peers':>7}{'planned':>10}{'predicted':>11}"
    )
    for rank in found.ranks if len(found.ranks) <= 32 else _extremes(found.ranks):
        yield (
            f"{rank.rank:>6}{rank.copied / gib:>10.3f}{rank.received / gib:>10.3f}"
            f"{rank.received_bound / gib:>10.3f}{rank.from_network / gib:>10.3f}"
            f"{rank.sent / gib:>10.3f}{rank.messages:>10}{rank.peers:>7}{rank.plan_s:>8.2f} s"
            f"{1e3 * rates.seconds(rank):>8.1f} ms"
        )
    yield ""
    received, bound = (
        sum(r.received for r in found.ranks), sum(r.received_bound for r in found.ranks)
    )  # fmt: skip
    yield f"received ÷ lower bound, all ranks    {_ratio(received, bound)}"
    for node, (entered, least) in sorted(found.network.items()):
        if least:
            yield f"over the network ÷ lower bound, node {node:<3} {_ratio(entered, least)}"
    most, mean = _send_balance(found)
    yield f"sent by the busiest rank ÷ mean      {_ratio(most, mean)}"
    yield f"buffers                              {2 * message_bytes / 2**20:.0f} MiB a rank"
    slowest = max(rates.seconds(rank) for rank in found.ranks)
    yield (
        f"predicted                            {1e3 * slowest:.1f} ms at {rates.inside / 1e9:g} "
        f"GB/s inside a node and {rates.network / 1e9:g} GB/s between nodes"
    )


def _extremes(ranks: list[RankTraffic]) -> list[RankTraffic]:
    """The ranks that receive most, that send most, and that take longest to plan."""
    chosen = {
        max(ranks, key=lambda r: r.received).rank: 0,
        max(ranks, key=lambda r: r.sent).rank: 0,
        max(ranks, key=lambda r: r.plan_s).rank: 0,
        ranks[0].rank: 0,
        ranks[-1].rank: 0,
    }
    return [rank for rank in ranks if rank.rank in chosen]


def _send_balance(found: Traffic) -> tuple[float, float]:
    sent = [rank.sent for rank in found.ranks]
    return max(sent), sum(sent) / len(sent)


def _ratio(value: float, least: float) -> str:
    return f"{value / least:.3f}" if least else ("1.000" if not value else "more than nothing")
