"""Recipes by their dotted names: functions that return a complete, frozen `RunConfig`.

A new recipe is a function in a folder of its own and a row in `RECIPES`. This package imports
no torch, so that a misspelt name is reported at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from megatron_precision.checks.settings import unknown_algorithm, unknown_precision
from megatron_precision.config import overrides as typed
from megatron_precision.config.errors import Problem, UserError, unknown_name
from megatron_precision.config.schema import RunConfig
from megatron_precision.precision.policy import is_precision
from megatron_precision.preflight import search
from megatron_precision.rl.algorithms import ALGORITHMS
from recipes import dense14b, moe, octothinker, sanity
from recipes.layouts import Size, Sized
from recipes.sanity import r1_distill, smollm2

Recipe = Callable[..., RunConfig]

RECIPES: dict[str, Recipe] = {
    "sanity.tiny_dense": sanity.tiny_dense,
    "sanity.tiny_moe": sanity.tiny_moe,
    "sanity.r1d_1_5b": r1_distill.r1d_1_5b,
    "sanity.smollm2": smollm2.smollm2,
    "dense14b.dapo": dense14b.dapo,
    "moe.grpo_seq_mis": moe.grpo_seq_mis,
    "moe.grpo_token_tis": moe.grpo_token_tis,
    "moe.pg_seq_tis": moe.pg_seq_tis,
    "octothinker.octothinker_3b": octothinker.octothinker_3b,
}
# Recipes for jobs of several sizes; the others have the one layout.
SIZED: dict[str, Sized] = {
    "sanity.r1d_1_5b": Sized(r1_distill.LAYOUTS, r1_distill.DEFAULT),
    "dense14b.dapo": Sized(dense14b.LAYOUTS, dense14b.DEFAULT),
    "moe.grpo_seq_mis": Sized(moe.LAYOUTS, moe.DEFAULT),
    "moe.grpo_token_tis": Sized(moe.LAYOUTS, moe.DEFAULT),
    "moe.pg_seq_tis": Sized(moe.LAYOUTS, moe.DEFAULT),
    "octothinker.octothinker_3b": Sized(octothinker.LAYOUTS, octothinker.DEFAULT),
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


def recipe(name: str, gpus: int | None = None, gpu_gb: int | None = None) -> RunConfig:
    """A recipe as it stands.

    Args:
        name: a key of `RECIPES`.
        gpus: of the job; by default the recipe's own.
        gpu_gb: of each GPU, 1e9 bytes; by default the recipe's own.

    Raises:
        UserError: for a name that is not in `RECIPES`, for sizes of a recipe that has the one
            layout, and for a size that the recipe has no layout for.
    """
    if name not in RECIPES:
        raise UserError(unknown_name("recipe", "RECIPE", name, list(RECIPES)))
    if name in SIZED:
        size = SIZED[name].size(gpus, gpu_gb)
        if size not in SIZED[name].layouts:
            raise UserError(_no_layout(name, size))
        return RECIPES[name](chosen=SIZED[name].layouts[size])
    if gpus is not None or gpu_gb is not None:
        raise UserError(
            Problem(
                "this recipe has one layout", "--gpus, --gpu-gb", name,
                "one of " + ", ".join(SIZED), "change parallel.* with --set",
            )
        )  # fmt: skip
    return RECIPES[name]()


def _no_layout(name: str, size: Size) -> Problem:
    """Why a recipe has no layout of a size: the model does not fit, or nobody has made one."""
    config = RECIPES[name](chosen=SIZED[name].like(size))
    sizes = "; ".join(map(str, SIZED[name].layouts))
    verdict = search.judge(config, size.gpu_gb)
    if config.parallel.world_size == size.gpus and not verdict.fits:
        return search.refusal(verdict)
    found = search.nearest(config, size.gpu_gb, size.gpus) if size.gpus >= 1 else None
    return Problem(
        what=f"{name} has no layout for {size}",
        where="--gpus, --gpu-gb",
        got=f"{size.gpus} and {size.gpu_gb}",
        expected=f"one of: {sizes}",
        remedy=(
            f"--set parallel.world_size={size.gpus} {search.describe(found.config.parallel)} "
            "fits and was never run"
            if found
            else "no layout of that size fits"
        ),
    )


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
        problems.append(unknown_algorithm("--algo", algo))
    config, wrong = typed.examine(config, changes)
    return config, [*problems, *wrong]
