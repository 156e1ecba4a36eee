"""Recipes by name: functions that return a complete, frozen `RunConfig`.

A new recipe of the project is a function in a folder here and a row in `RECIPES`. A user's own is
a function in any file: `FILE.py` means its function `recipe()`, `FILE.py:NAME` another one. This
package imports no torch, so that a misspelt name is reported at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from megatron_precision.checks import own_code
from megatron_precision.checks.settings import unknown_precision
from megatron_precision.config import overrides as typed
from megatron_precision.config import user_files
from megatron_precision.config.errors import Problem, UserError, unknown_name
from megatron_precision.config.schema import RunConfig
from megatron_precision.precision.policy import is_precision
from megatron_precision.rl.algorithms import ALGORITHMS, unknown_algorithm
from recipes import dense14b, moe, octothinker, sanity
from recipes.layouts import NoLayoutError, Sized
from recipes.sanity import r1_distill, smollm2

# The function that a file alone means.
DEFAULT_FUNCTION = "recipe"


@dataclass(frozen=True)
class Recipe:
    """A row of `RECIPES`.

    Attributes:
        function: `(precision)` to the configuration; `(precision, chosen)` where it is sized.
        sized: the layouts for jobs of several sizes; None where the function has one layout.
    """

    function: Callable[..., RunConfig]
    sized: Sized | None = None


_MOE = Sized(moe.LAYOUTS, moe.DEFAULT)

RECIPES: dict[str, Recipe] = {
    "sanity.tiny_dense": Recipe(sanity.tiny_dense),
    "sanity.tiny_moe": Recipe(sanity.tiny_moe),
    "sanity.r1d_1_5b": Recipe(r1_distill.r1d_1_5b, Sized(r1_distill.LAYOUTS, r1_distill.DEFAULT)),
    "sanity.smollm2": Recipe(smollm2.smollm2),
    "dense14b.dapo": Recipe(dense14b.dapo, Sized(dense14b.LAYOUTS, dense14b.DEFAULT)),
    "moe.grpo_seq_mis": Recipe(moe.grpo_seq_mis, _MOE),
    "moe.grpo_token_tis": Recipe(moe.grpo_token_tis, _MOE),
    "moe.pg_seq_tis": Recipe(moe.pg_seq_tis, _MOE),
    "octothinker.octothinker_3b": Recipe(
        octothinker.octothinker_3b, Sized(octothinker.LAYOUTS, octothinker.DEFAULT)
    ),
}


def sized(name: str | None) -> Sized | None:
    """Return the layouts of a recipe; None for one layout, an unknown name and a user's file."""
    row = RECIPES.get(name or "")
    return row.sized if row else None


def sized_names() -> list[str]:
    """List the recipes that have layouts for jobs of several sizes."""
    return [name for name, row in RECIPES.items() if row.sized]


def build(
    name: str,
    precision: str | None = None,
    algo: str | None = None,
    overrides: Sequence[str] = (),
) -> RunConfig:
    """Build the configuration of a recipe, with what the user changed.

    Args:
        name: a key of `RECIPES`, `FILE.py`, or `FILE.py:FUNCTION`.
        precision: a policy name (`fp16`, `bf16`, `fp32`, or `TRAIN/ROLLOUT`); None keeps the
            recipe's own.
        algo: a key of `ALGORITHMS`, or `FILE.py:ROW`; None keeps the recipe's own.
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
    """Append the errors in --precision, --algo and --set to an error that leaves no recipe."""
    # Every recipe has the same fields.
    config, found = examine(sanity.tiny_dense(), precision, algo, overrides)
    found += own_code.algorithm_problems(config)
    if user_files.is_reference(config.task.scorer):
        found += own_code.scorer_problems(config)
    return UserError([*wrong.problems, *found])


def recipe(name: str, gpus: int | None = None, gpu_gb: int | None = None) -> RunConfig:
    """Build a recipe as it stands.

    Args:
        name: a key of `RECIPES`, `FILE.py`, or `FILE.py:FUNCTION`.
        gpus: GPUs of the job; None takes the recipe's own.
        gpu_gb: memory of each GPU, 1e9 bytes; None takes the recipe's own.

    Raises:
        UserError: the name is unknown, its file cannot be used, or it has one layout and a size
            was given.
        NoLayoutError: the recipe has no layout of that size.
    """
    of_file = user_files.is_reference(name)
    if not of_file and name not in RECIPES:
        problem = unknown_name("recipe", "RECIPE", name, list(RECIPES))
        expected = f"{problem.expected}; or FILE.py of your own"
        raise UserError(dataclasses.replace(problem, expected=expected))
    row = sized(name)
    if row is not None:
        function, size = RECIPES[name].function, row.size(gpus, gpu_gb)
        if size not in row.layouts:
            raise NoLayoutError(name, size, row, function(chosen=row.like(size)))
        return function(chosen=row.layouts[size])
    if gpus is not None or gpu_gb is not None:
        raise UserError(
            Problem(
                "this recipe has one layout", "--gpus, --gpu-gb", name,
                "one of " + ", ".join(sized_names()), "change parallel.* with --set",
            )
        )  # fmt: skip
    return _from_file(name) if of_file else RECIPES[name].function()


def _from_file(reference: str) -> RunConfig:
    """Call the recipe in a user's file; the configuration is named by the file and the function."""
    expected = f"a function {DEFAULT_FUNCTION}() -> RunConfig"
    found = user_files.load(reference, "RECIPE", expected, DEFAULT_FUNCTION)
    place = user_files.place(found, reference, "RECIPE")
    path, name = user_files.split(reference, DEFAULT_FUNCTION)
    if not callable(found):
        raise UserError(Problem(f"{name} is not a function", place, repr(found), expected))
    config = user_files.call(found, reference, "RECIPE")
    if not isinstance(config, RunConfig):
        got = "nothing" if config is None else f"{type(config).__name__}: {config!r}"
        raise UserError(Problem(f"{name}() returns no configuration", place, got, expected))
    named = path.name if name == DEFAULT_FUNCTION else f"{path.name}:{name}"
    return dataclasses.replace(config, recipe=named)


def examine(
    config: RunConfig,
    precision: str | None = None,
    algo: str | None = None,
    overrides: Sequence[str] = (),
) -> tuple[RunConfig, list[Problem]]:
    """Change a configuration as far as `build`'s arguments can be read.

    Paths of the user's own algorithm and scorer become absolute: the ranks of a job read them
    from `config.json`, wherever they run.

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
    if algo is not None and (algo in ALGORITHMS or user_files.is_reference(algo)):
        changes.insert(0, f"algo.name={algo}")
    elif algo is not None:
        problems.append(unknown_algorithm("--algo", algo))
    config, wrong = typed.examine(config, changes)
    config = dataclasses.replace(
        config,
        algo=dataclasses.replace(config.algo, name=user_files.absolute(config.algo.name)),
        task=dataclasses.replace(config.task, scorer=user_files.absolute(config.task.scorer)),
    )
    return config, [*problems, *wrong]
