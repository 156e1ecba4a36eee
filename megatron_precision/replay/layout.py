"""A trainer's layout as `--layout` takes it and as a replay names it."""

from __future__ import annotations

from megatron_precision.config import ParallelConfig, RunConfig
from megatron_precision.errors import Problem, UserError

SIZES = ("tp", "pp", "ep", "etp", "dp", "sp")


def layout_of(text: str, config: RunConfig) -> ParallelConfig:
    """A trainer's layout as a user writes it; sizes that are not named are 1.

    `sp` is sequence parallelism, 0 or 1. Where it is not named, it is that of the run, and on
    where Megatron asks for it: experts with tensor parallelism.

    Raises:
        UserError: lists what is no size.
    """
    sizes: dict[str, int] = {}
    problems = []
    for word in text.split(","):
        name, _, value = word.strip().partition("=")
        # bool("²".isdigit()) is true; int() refuses it.
        if name not in SIZES or name in sizes or not (value.isascii() and value.isdecimal()):
            expected = f"{', '.join(SIZES)}, each once, with commas between: tp=2,pp=1"
            problems.append(Problem("no part of a layout", "--layout", word, expected))
            continue
        sizes[name] = int(value)
        if not (sizes[name] > 0 or name == "sp") or (name == "sp" and sizes[name] > 1):
            expected = "0 or 1" if name == "sp" else "1 or more"
            problems.append(Problem("a size out of range", "--layout", word, expected))
    if problems:
        raise UserError(problems)
    tp, pp, dp = (sizes.get(name, 1) for name in ("tp", "pp", "dp"))
    asked = tp > 1 and (config.parallel.sequence_parallel or config.model.num_experts > 0)
    return ParallelConfig(
        world_size=tp * pp * dp,
        tp_size=tp,
        pp_size=pp,
        ep_size=sizes.get("ep", 1),
        etp_size=sizes.get("etp", 1),
        sequence_parallel=bool(sizes.get("sp", asked)),
    )


def layout_words(parallel: ParallelConfig) -> str:
    """A layout as `--layout` takes it, without what is 1."""
    sizes = {
        "tp": parallel.tp_size, "pp": parallel.pp_size, "ep": parallel.ep_size,
        "etp": parallel.etp_size, "dp": parallel.dp_size, "sp": int(parallel.sequence_parallel),
    }  # fmt: skip
    words = [f"{name}={size}" for name, size in sizes.items() if size > (name != "sp")]
    return ",".join(words or ["tp=1"])
