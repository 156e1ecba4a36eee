"""The command `sync-bench`: plans a weight sync between two layouts and prints what it moves."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_precision.cli.layouts import MOST_RANKS, axis_sizes
from megatron_precision.config.errors import Problem, UserError, nearest
from megatron_precision.config.schema import ModelConfig
from megatron_precision.layouts.architectures import KNOWN_MODELS
from megatron_precision.layouts.hf_config import read_model
from megatron_precision.layouts.vllm import padded_vocab_rows
from megatron_precision.preflight import sync
from megatron_precision.sync.families import RolloutLayout, TrainerLayout
from megatron_precision.sync.plan import CELL_ELEMENTS, Planner, cell_elements_of

TRAIN_SIZES = dict.fromkeys(("tp", "pp", "ep", "etp", "dp"), range(1, MOST_RANKS + 1))
ROLLOUT_SIZES = dict.fromkeys(("tp", "dp", "ep"), range(1, MOST_RANKS + 1))
MOST_BATCH_MIB = 2**13  # larger messages are typing errors


def add(commands: Any) -> None:
    """Add the command to the parsers of commands."""
    bench = commands.add_parser("sync-bench", help="what a weight sync moves between two layouts")
    add_layout_arguments(bench)
    bench.add_argument(
        "--nvlink", type=float, default=450.0, metavar="GB/S", help="of a rank, one way"
    )
    bench.add_argument("--nic", type=float, default=50.0, metavar="GB/S", help="of a rank, one way")
    bench.set_defaults(run=_run)


def add_layout_arguments(bench: argparse.ArgumentParser) -> None:
    """Add the arguments that `requested_planner` reads."""
    bench.add_argument(
        "--model", required=True, help="qwen3-14b, qwen3-30b-a3b, qwen3-235b-a22b, or a folder"
    )
    bench.add_argument("--train", default="tp=1", metavar="SIZES", help="tp, pp, ep, etp, dp: tp=8")
    bench.add_argument("--rollout", default="tp=1", metavar="SIZES", help="tp, dp, ep: tp=2,dp=4")
    bench.add_argument("--world", type=int, metavar="N", help="ranks of either side")
    bench.add_argument("--apart", action="store_true", help="engines on ranks of their own")
    bench.add_argument("--ranks-per-node", type=int, default=8, metavar="N", help="default: 8")
    bench.add_argument("--wire", choices=("fp16", "bf16", "fp32"), default="fp16")
    bench.add_argument("--batch-mib", type=int, default=64, metavar="N", help="default: 64")
    bench.add_argument("--layers", type=int, metavar="N", help="of the model's; default: all")
    bench.add_argument("--vocab-rows", type=int, metavar="N", help="of the model's; default: all")
    bench.add_argument("--json", action="store_true", help="print the raw figures")


def _run(args: argparse.Namespace) -> int:
    planner = requested_planner(args, nvlink=args.nvlink, nic=args.nic)
    rates = sync.Rates(args.nvlink * 1e9, args.nic * 1e9)
    itemsize = 4 if args.wire == "fp32" else 2
    return sync.run(planner, itemsize, args.batch_mib * 2**20, rates, args.json)


def requested_planner(args: argparse.Namespace, **numbers: float) -> Planner:
    """Build the planner for the layouts that the arguments ask for.

    Args:
        numbers: further numbers that must be positive, by their options' names.

    Raises:
        UserError: lists every mistake, of numbers, model and sizes.
    """
    problems: list[Problem] = []
    model = planner = None
    with collecting(problems):
        refuse_numbers(
            world=args.world,
            ranks_per_node=args.ranks_per_node,
            batch_mib=args.batch_mib,
            layers=args.layers,
            vocab_rows=args.vocab_rows,
            **numbers,
        )
    wrong = {problem.where for problem in problems}
    with collecting(problems):
        model = in_small(model_of(args.model), args.layers, args.vocab_rows)
    with collecting(problems):
        if model is None or wrong & {"--world", "--layers", "--vocab-rows"}:
            # Without the model or the world, only the words themselves can be checked.
            sizes_of(args.train, args.rollout)
        else:
            planner = planner_of(
                model,
                args.train,
                args.rollout,
                args.world,
                args.ranks_per_node,
                args.apart,
                cell_elements_of(args.batch_mib * 2**20),
            )
    if problems:
        raise UserError(problems)
    assert planner is not None, "there is one unless there is a problem"
    return planner


def model_of(name: str) -> ModelConfig:
    """Return a known model, or read the model of a Hugging Face or converted Megatron folder.

    Raises:
        UserError: if `name` is neither.
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
    """Return the model with fewer layers or a smaller vocabulary, and otherwise the same shape.

    Raises:
        UserError: for more layers or rows than the model has.
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
    """Build the planner for two layouts that a user typed.

    Args:
        train: for example `tp=8,pp=2`; data parallelism fills the world unless `dp` is given.
        rollout: for example `tp=2,dp=4`; `ep`, equal to `tp`, gives each rank whole experts.
        world: number of ranks on each side; by default, the product of the trainer's sizes.
        apart: whether the engines have their own ranks, after the trainer's.

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
    """Parse the sizes of the trainer and of the engines; sizes that are not named are 1.

    Raises:
        UserError: lists every size that is unknown, out of range or given twice.
    """
    problems: list[Problem] = []
    t = axis_sizes("--train", train, TRAIN_SIZES, problems)
    r = axis_sizes("--rollout", rollout, ROLLOUT_SIZES, problems)
    if problems:
        raise UserError(problems)
    return dict.fromkeys(TRAIN_SIZES, 1) | t, dict.fromkeys(ROLLOUT_SIZES, 1) | r


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
    """Collect the problems of a UserError, so that the other arguments are checked as well."""
    try:
        yield
    except UserError as wrong:
        problems += wrong.problems


def refuse_numbers(**options: float | None) -> None:
    """Check that numbers are positive and not above their limits.

    Args:
        options: option names with their values; None for an option that is not given.

    Raises:
        UserError: lists every option that is out of its range.
    """
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
