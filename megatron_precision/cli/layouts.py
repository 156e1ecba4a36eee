"""Parses layouts that a user types as words: `tp=2,dp=4`."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.schema import ParallelConfig, RunConfig

# Larger worlds are typing errors.
MOST_RANKS = 2**16


def axis_sizes(
    option: str, text: str, known: Mapping[str, range], problems: list[Problem]
) -> dict[str, int]:
    """Parse `NAME=SIZE,NAME=SIZE`.

    Args:
        option: the option that has the text, for error messages.
        known: the names that the option takes, each with the range of its sizes.
        problems: is extended by every word that is not a size or names a size again.

    Returns:
        The sizes that the text names.
    """
    found: dict[str, int] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        # isdecimal() is true of other scripts' digits, which int() reads as well.
        right = name in known and value.isdecimal() and int(value) in known[name]
        if not right:
            problems.append(Problem("not a layout", option, part or "nothing", _expected(known)))
        elif name in found:
            problems.append(Problem("a size given twice", option, text, f"{name} once"))
        else:
            found[name] = int(value)
    return found


def _expected(known: Mapping[str, range]) -> str:
    names: dict[str, list[str]] = {}
    for name, sizes in known.items():
        names.setdefault(f"{sizes[0]} to {sizes[-1]}", []).append(name)
    parts = [f"{', '.join(group)} = {sizes}" for sizes, group in names.items()]
    return f"{'; '.join(parts)}, joined by commas"


_REPLAY_SIZES = dict.fromkeys(("tp", "pp", "ep", "etp", "dp"), range(1, MOST_RANKS + 1))
_REPLAY_SIZES["sp"] = range(2)


def replay_layout(text: str, config: RunConfig) -> ParallelConfig:
    """Parse the trainer's layout of a replay; sizes that are not named are 1.

    `sp` is sequence parallelism, 0 or 1. If it is not named and tensor parallelism is used, it is
    on for a run that had it on, and for a model with experts, for which Megatron requires it.

    Raises:
        UserError: lists every word that is not a size.
    """
    problems: list[Problem] = []
    sizes = axis_sizes("--layout", text, _REPLAY_SIZES, problems)
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
