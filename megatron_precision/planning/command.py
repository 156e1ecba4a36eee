"""`python -m megatron_precision plan`: what a run needs and takes, before anything is started."""

from __future__ import annotations

import argparse
import json
from typing import Any

from megatron_precision import arguments, layout_checks, validation
from megatron_precision.config import RunConfig
from megatron_precision.errors import Problem, UserError
from megatron_precision.planning import job, preflight, search, tables
from megatron_precision.planning.search import GB, Verdict
from megatron_precision.platform import support
from megatron_precision.platform.choice import Choice


def add(commands: Any) -> None:
    """Add the command to the parsers of commands."""
    plan = commands.add_parser(
        "plan", help="preflight: conflicts, memory, sync, time and cost of a run; no GPU needed"
    )
    arguments.add_recipe_arguments(plan)
    job.add_arguments(plan)
    plan.add_argument(
        "--all-sizes", action="store_true", help="a table of every size that the recipe is for"
    )
    plan.add_argument("--json", action="store_true", help="print the raw figures")
    # `resolve` leaves the verdict on memory to this command.
    plan.set_defaults(run=_run, judged=True)


def _run(args: argparse.Namespace) -> int:
    if args.all_sizes:
        return _all_sizes(args)
    config = _resolve(args)
    if refused := list(support.problems(config, Choice("cuda", "a plan is for GPUs"))):
        raise UserError(refused)
    gpu_gb = arguments.gpu_gb(args)
    verdict = search.judge(config, gpu_gb)
    found = preflight.of_run(
        verdict,
        args.gpus_per_node,
        job.rates(args, config, gpu_gb),
        job.lengths(args, config),
        job.sampled_per_kept(args, config),
    )
    if args.json:
        print(json.dumps(found.values(), indent=2))
    else:
        print("\n".join(tables.lines(found)), end="\n\n")
    if not verdict.fits:
        raise UserError(search.refusal(verdict))
    if not args.json:
        print(f"fits: {verdict.needed / GB:.1f} of {gpu_gb} GB on the fullest rank")
    return 0


def _resolve(args: argparse.Namespace) -> RunConfig:
    """The configuration for the job that the options name.

    Raises:
        UserError: lists everything that is wrong with either, and what would fit instead.
    """
    problems = list(job.problems(args))
    size = None if problems else job.world(args)
    if size is not None:
        _widen(args, size)
        problems += job.node_problems(size, args.gpus_per_node)
    try:
        config = arguments.resolve(args)
    except UserError as wrong:
        raise UserError([*problems, *wrong.problems, *_instead(args, wrong)]) from None
    if size is None:
        problems += job.node_problems(config.parallel.world_size, args.gpus_per_node)
    problems += job.length_problems(args, config)
    if problems:
        raise UserError(problems)
    return config


def _widen(args: argparse.Namespace, size: int) -> None:
    """Take the recipe's layout for so many GPUs, or its largest that such a job has room for.

    The layout's own sizes stay, and data parallelism and engine replicas fill the world.
    """
    import recipes

    args.gpus = None
    sized = recipes.SIZED.get(args.recipe or "")
    if sized is not None:
        gpu_gb = args.gpu_gb or sized.default.gpu_gb
        known = sorted(s.gpus for s in sized.layouts if s.gpu_gb == gpu_gb)
        room = [gpus for gpus in known if gpus <= size]
        args.gpus = room[-1] if room else size
        if args.gpus == size:
            return  # or no layout is that small, and `recipes` says what would do
    args.overrides = [f"parallel.world_size={size}", *args.overrides]


def _instead(args: argparse.Namespace, wrong: UserError) -> list[Problem]:
    """The nearest layout that is valid and fits, where the layout alone is wrong."""
    import recipes

    try:
        base = arguments.chosen(args)
    except UserError:
        return []
    config, _ = recipes.examine(base, args.precision, args.algo, args.overrides)
    layout = _of_layout(config)
    if not layout or {problem.what for problem in wrong.problems} - layout:
        return []
    gpu_gb = arguments.gpu_gb(args)
    found = search.nearest(config, gpu_gb)
    if found is None:
        return [
            Problem(
                what=f"no layout of {config.parallel.world_size} GPUs divides and fits",
                where="parallel.*",
                got=f"{config.parallel.world_size} GPUs of {gpu_gb} GB",
                expected=search.other_sizes(config, gpu_gb) or "a smaller model, or larger GPUs",
            )
        ]
    return [
        Problem(
            what="no such layout; the nearest that divides and fits",
            where="parallel.*",
            got=search.describe(config.parallel),
            expected=f"for example {search.describe(found.config.parallel)}",
            remedy=f"--set {search.changes(found.config, config)} "
            f"({found.needed / GB:.1f} of {gpu_gb} GB a rank)",
        )
    ]


def _of_layout(config: RunConfig) -> set[str]:
    """What is wrong with the layout, where all sizes are possible ones."""
    if any(problem.what == "value out of range" for problem in validation.problems(config)):
        return set()
    return {problem.what for problem in layout_checks.problems(config)}


def _all_sizes(args: argparse.Namespace) -> int:
    import recipes
    from recipes.layouts import SIZES

    problems = list(job.problems(args))
    sized = recipes.SIZED.get(args.recipe or "")
    if sized is None:
        known = "one of " + ", ".join(recipes.SIZED)
        problems.append(Problem("no table of sizes", "--all-sizes", str(args.recipe), known))
    if job.world(args) is not None:
        problems.append(
            Problem(
                "a size, and all of them", "--all-sizes", "--nodes or --world",
                "one or the other",
            )
        )  # fmt: skip
    if problems or sized is None:
        raise UserError(problems)
    rows: list[tuple[str, Verdict | None, str]] = []
    for size in dict.fromkeys((*SIZES, *sized.layouts)):
        args.gpus, args.gpu_gb = size.gpus, size.gpu_gb
        try:
            verdict = search.judge(arguments.resolve(args), size.gpu_gb)
            why = "" if verdict.fits else str(search.refusal(verdict))
            rows.append((str(size), verdict, why))
        except UserError as wrong:
            rows.append((str(size), None, str(wrong)))
    if args.json:
        values = [
            {"size": size, **(preflight.figures(verdict) if verdict else {"refused": why})}
            for size, verdict, why in rows
        ]
        print(json.dumps(values, indent=2))
    else:
        print("\n".join(tables.sizes(rows)))
    return 0
