"""What a weight sync moves between two layouts, planned on the spot.

Neither torch nor an engine is loaded: a plan for a thousand ranks needs none of them.

The layouts of `sync-bench`, as a user writes them, and what is wrong with them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_precision.config.errors import Problem, UserError, nearest
from megatron_precision.config.schema import ModelConfig
from megatron_precision.layouts.architectures import KNOWN_MODELS
from megatron_precision.layouts.hf_config import read_model
from megatron_precision.layouts.vllm import padded_vocab_rows
from megatron_precision.sync.families import RolloutLayout, TrainerLayout
from megatron_precision.sync.plan import CELL_ELEMENTS, Planner
from megatron_precision.sync.traffic import RankTraffic, Traffic, traffic


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


def run(planner: Planner, itemsize: int, batch_bytes: int, rates: Rates, as_json: bool) -> int:
    """Plan, and print what it moves."""
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
    """Both layouts, a line each."""
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
    """Bytes for a person."""
    unit, size = _unit(count)
    return f"{count / size:.2f} {unit}"


def _unit(most: int) -> tuple[str, int]:
    """The largest unit of which there is one."""
    units = {"GiB": 2**30, "MiB": 2**20, "KiB": 2**10}
    return next(((name, size) for name, size in units.items() if most >= size), ("KiB", 2**10))


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


def _ratio(value: float, least: float) -> str:
    return f"{value / least:.3f}" if least else ("1.000" if not value else "more than nothing")


TRAIN_SIZES = ("tp", "pp", "ep", "etp", "dp")
ROLLOUT_SIZES = ("tp", "dp", "ep")
# Larger worlds and messages are typing errors; a plan's time grows with the first.
MOST_RANKS = 2**16
MOST_BATCH_MIB = 2**13


def model_of(name: str) -> ModelConfig:
    """A known model, or that of a Hugging Face or a converted Megatron folder.

    Raises:
        UserError: where it is neither.
    """
    if name in KNOWN_MODELS:
        return KNOWN_MODELS[name]
    if Path(name).is_dir():
        # The converter keeps the configuration beside Megatron's tensors.
        megatron = Path(name, ".metadata").is_file()
        return read_model(Path(name, "huggingface" if megatron else "", "config.json"))
    close = nearest(name, list(KNOWN_MODELS))
    raise UserError(
        Problem(
            "unknown model", "--model", name, f"one of {', '.join(KNOWN_MODELS)}, or a folder",
            f"did you mean {close[0]}?" if close else "",
        )
    )  # fmt: skip


def in_small(model: ModelConfig, layers: int | None, vocab_rows: int | None) -> ModelConfig:
    """A model with fewer layers, or a smaller vocabulary, of the same shape otherwise.

    Raises:
        UserError: for more than it has.
    """
    chosen = {"num_hidden_layers": layers, "vocab_size": vocab_rows}
    options = {"num_hidden_layers": "--layers", "vocab_size": "--vocab-rows"}
    given = {name: count for name, count in chosen.items() if count is not None}
    problems = [
        Problem("more than the model has", options[name], str(count), str(getattr(model, name)))
        for name, count in given.items()
        if count > getattr(model, name)
    ]
    if problems:
        raise UserError(problems)
    changed: dict[str, Any] = given
    return replace(model, **changed)


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
    t, r = sizes_of(train, rollout)
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
    if (ranks := max(size, engines) * (1 + apart)) > 2 * MOST_RANKS:
        problems.append(
            Problem("too many ranks", "--train, --rollout", str(ranks), f"up to {MOST_RANKS}")
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


def sizes_of(train: str, rollout: str) -> tuple[dict[str, int], dict[str, int]]:
    """The trainer's sizes and the engine's, as a user writes them; those not given are 1.

    Raises:
        UserError: lists every size that is unknown, out of range or given twice.
    """
    problems: list[Problem] = []
    t = _axis_sizes("--train", train, TRAIN_SIZES, problems)
    r = _axis_sizes("--rollout", rollout, ROLLOUT_SIZES, problems)
    if problems:
        raise UserError(problems)
    return t, r


def _axis_sizes(
    option: str, text: str, known: tuple[str, ...], problems: list[Problem]
) -> dict[str, int]:
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = part.partition("=")
        right = name in known and value.isdecimal() and 0 < int(value) <= MOST_RANKS
        if not right:
            expected = f"{', '.join(known)} = 1 to {MOST_RANKS}, joined by commas"
            problems.append(Problem("not a layout", option, part or "nothing", expected))
        elif name in found:
            problems.append(Problem("a size given twice", option, text, f"{name} once"))
        else:
            found[name] = int(value)
    return dict.fromkeys(known, 1) | found


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


@contextlib.contextmanager
def collecting(problems: list[Problem]) -> Iterator[None]:
    """Keep what one part of the arguments is refused for, so that the others are looked at too."""
    try:
        yield
    except UserError as wrong:
        problems += wrong.problems


def refuse_numbers(**options: float | None) -> None:
    """Raise a UserError that lists every option out of its range; None is not given."""
    most = {"world": MOST_RANKS, "batch_mib": MOST_BATCH_MIB}
    problems = []
    for name, value in options.items():
        limit = most.get(name)
        if value is None or (0 < value < math.inf and (limit is None or value <= limit)):
            continue
        expected = f"1 to {limit}" if limit else "a positive number"
        where = "--" + name.replace("_", "-")
        problems.append(Problem("out of range", where, f"{value:g}", expected))
    if problems:
        raise UserError(problems)
