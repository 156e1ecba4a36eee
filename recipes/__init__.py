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
    try:
        base = recipe(name)
    except UserError as wrong:
        raise with_all_problems(wrong, precision, algo, overrides) from None
    config, problems = examine(base, precision, algo, overrides)
    if problems:
        raise UserError(problems)
    return config


def with_all_problems(
    wrong: UserError, precision: str | None, algo: str | None, overrides: Sequence[str]
) -> UserError:
    """`wrong`, and what can be told of the options without the configuration they change."""
    # Every recipe has the same fields.
    _, found = examine(sanity.tiny_dense(), precision, algo, overrides)
    return UserError([*wrong.problems, *found])


def recipe(name: str) -> RunConfig:
    """A recipe as it stands.

    Raises:
        UserError: for a name that is not in `RECIPES`.
    """
    if name not in RECIPES:
        raise UserError(unknown_name("recipe", "RECIPE", name, list(RECIPES)))
    return RECIPES[name]()


def examine(
    config: RunConfig,
    precision: str | None = None,
    algo: str | None = None,
    overrides: Sequence[str] = (),
) -> tuple[RunConfig, list[Problem]]:
    """A configuration with what could be changed of what the user asked, by `build`'s arguments.

    Returns:
        The changed configuration, and the problems of an unknown precision and algorithm and of
        every bad override; what they name is left as it was.
    """
    problems: list[Problem] = []
    changes = list(overrides)
    if precision is not None and is_precision(precision):
        changes.insert(0, f"precision={precision}")
    elif precision is not None:
        problems.append(unknown_precision("--precision", precision))
    if algo in ALGORITHMS:
        changes.insert(0, f"algo.name={algo}")
    elif algo is not None:
        problems.append(unknown_name("algorithm", "--algo", algo, list(ALGORITHMS)))
    config, wrong = typed.examine(config, changes)
    return config, [*problems, *wrong]
