"""The layouts of `sync-bench`, as a user writes them, and what is wrong with them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron_precision.config import ModelConfig
from megatron_precision.errors import Problem, UserError, nearest
from megatron_precision.weights.families import RolloutLayout, TrainerLayout
from megatron_precision.weights.hf_config import read_model
from megatron_precision.weights.known_models import KNOWN_MODELS
from megatron_precision.weights.plan import CELL_ELEMENTS, Planner
from megatron_precision.weights.vllm_layout import padded_vocab_rows

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
    t = _sizes("--train", train, TRAIN_SIZES, problems)
    r = _sizes("--rollout", rollout, ROLLOUT_SIZES, problems)
    if problems:
        raise UserError(problems)
    return t, r


def _sizes(
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
