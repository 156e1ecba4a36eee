"""Recipes by their dotted names: functions that return a complete, frozen `RunConfig`.

A new recipe is a function in a folder of its own and a row in `RECIPES`. This package imports
no torch, so that a misspelt name is reported at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_precision import overrides as typed
from megatron_precision.config import RunConfig
from megatron_precision.errors import Problem, UserError, unknown_name
from megatron_precision.rl.algorithms import ALGORITHMS
from megatron_precision.validation import is_precision, unknown_precision
from recipes import sanity

Recipe = Callable[..., RunConfig]

RECIPES: dict[str, Recipe] = {
    "sanity.tiny_dense": sanity.tiny_dense,
    "sanity.tiny_moe": sanity.tiny_moe,
}


def build(
    name: str,
    precision: str | None = None,
    algo: str | None = None,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """The configuration of a recipe, with what the user changed.

    Args:
        name: a key of `RECIPES`.
        precision: a policy name (`fp16`, `bf16`, `fp32`, or `TRAIN/ROLLOUT`); the recipe's own
            when None.
        algo: a key of `ALGORITHMS`; the recipe's own when None.
        overrides: `PATH=VALUE` each.

    Raises:
        UserError: lists an unknown recipe, precision and algorithm and every bad override.
    """
    problems: list[Problem] = []
    if name not in RECIPES:
        problems.append(unknown_name("recipe", "RECIPE", name, list(RECIPES)))
    # The rest is checked even then: every recipe has the same fields.
    config = RECIPES.get(name, sanity.tiny_dense)()
    try:
        config = change(config, precision, algo, overrides)
    except UserError as wrong:
        problems.extend(wrong.problems)
    if problems:
        raise UserError(problems)
    return config


def change(
    config: RunConfig,
    precision: str | None = None,
    algo: str | None = None,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """A configuration with what the user changed, by the arguments of `build`.

    Raises:
        UserError: lists an unknown precision and algorithm and every bad override.
    """
    problems: list[Problem] = []
    changes = list(overrides)
    if precision is not None:
        changes.insert(0, f"precision={precision}")
        if not is_precision(precision):
            problems.append(unknown_precision("--precision", precision))
    if algo is not None:
        changes.insert(0, f"algo.name={algo}")
        if algo not in ALGORITHMS:
            problems.append(unknown_name("algorithm", "--algo", algo, list(ALGORITHMS)))
    try:
        config = typed.apply(config, changes)
    except UserError as wrong:
        problems.extend(wrong.problems)
    if problems:
        raise UserError(problems)
    return config
