"""The command `plan`: predicts memory, weight sync, time and cost of a run; it needs no GPU.

It reads the job's size and the rates of its machines from the options, resolves the recipe for that
size, and leaves the figures to `preflight/`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_precision.checks import platform, settings
from megatron_precision.checks.layout import layout_problems
from megatron_precision.cli import arguments
from megatron_precision.cli.layouts import MOST_RANKS
from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.schema import RunConfig
from megatron_precision.platform.choice import Choice
from megatron_precision.preflight import checks, search, tables
from megatron_precision.preflight.estimate import Rates
from megatron_precision.preflight.search import GB, Verdict
from megatron_precision.preflight.work import Lengths
from megatron_precision.rl.algorithms import algorithm


@dataclass(frozen=True)
class Card:
    """A GPU's data sheet.

    Attributes:
        tflops, fp32_tflops: peak of dense matrix products, 16-bit and FP32, in TFLOP/s.
        hbm: memory bandwidth in TB/s.
    """

    name: str
    tflops: float
    fp32_tflops: float
    hbm: float


# Source: NVIDIA's data sheets of H100 SXM and H200 SXM; without sparsity.
CARDS = {80: Card("H100 SXM", 989.0, 67.0, 3.35), 141: Card("H200 SXM", 989.0, 67.0, 4.8)}
# Mean lengths without an option are this share of their limits; the recipes' estimates use 5,000
# of 20,480.
LENGTH_SHARE = 0.25
# Dense-14B generates 1,536 prompts where it trains on 512 (arXiv 2510.26788).
SAMPLED_PER_KEPT = 3.0

_RATES: tuple[tuple[str, float | None, str, str], ...] = (
    ("--mean-prompt", None, "TOKENS", "of a prompt; default: a quarter of the limit"),
    ("--mean-response", None, "TOKENS", "of a response; default: a quarter of the limit"),
    ("--sampled-per-kept", None, "X", "groups sampled for one kept; default: 1, DAPO 3"),
    ("--tflops", None, "T", "peak of dense products; default: by --gpu-gb, H100 or H200"),
    ("--mfu", 0.35, "SHARE", "of the peak, in training and prefill; default: 0.35"),
    ("--hbm", None, "TB/S", "of a GPU; default: by --gpu-gb, H100 or H200"),
    ("--hbm-share", 0.6, "SHARE", "of it that decoding reaches; default: 0.6"),
    ("--launch-us", 400.0, "US", "host time a layer and decoding step; default: 400"),
    ("--nvlink", 450.0, "GB/S", "of a rank, one way; default: 450"),
    ("--nic", 50.0, "GB/S", "of a rank, one way; default: 50"),
)
_SHARES = ("--mfu", "--hbm-share")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options for the job's size and for the assumptions of the estimate."""
    size = parser.add_argument_group("the job")
    size.add_argument("--nodes", type=int, metavar="N", help="of --gpus-per-node each")
    size.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    size.add_argument("--world", type=int, metavar="N", help="GPUs in all; the recipe's by default")
    rates = parser.add_argument_group("what the estimate assumes")
    for option, default, unit, text in _RATES:
        rates.add_argument(option, type=float, default=default, metavar=unit, help=text)


def job_problems(args: argparse.Namespace) -> Iterator[Problem]:
    """Yield a problem for every option that is out of range or contradicts another."""
    for option in ("--nodes", "--gpus-per-node", "--world"):
        value = _value(args, option)
        if value is not None and not 1 <= value <= MOST_RANKS:
            yield Problem("out of range", option, str(value), f"1 to {MOST_RANKS}")
    for option, _, _, _ in _RATES:
        value = _value(args, option)
        most = 1.0 if option in _SHARES else math.inf
        if value is not None and not (0 < value <= most and math.isfinite(value)):
            expected = "more than 0, at most 1" if option in _SHARES else "a number above 0"
            yield Problem("out of range", option, f"{value:g}", expected)
    if args.sampled_per_kept is not None and 0 < args.sampled_per_kept < 1:
        yield Problem("out of range", "--sampled-per-kept", str(args.sampled_per_kept), "1 or more")
    made = None if args.nodes is None else args.nodes * args.gpus_per_node
    given = {"--nodes × --gpus-per-node": made, "--world": args.world, "--gpus": args.gpus}
    sizes = {name: size for name, size in given.items() if size is not None}
    if len(set(sizes.values())) > 1:
        yield Problem(
            "the job has several sizes",
            ", ".join(sizes),
            " and ".join(map(str, sizes.values())),
            "one of them",
        )


def world(args: argparse.Namespace) -> int | None:
    """Return the number of GPUs that the options ask for, or None."""
    if args.nodes is not None:
        return int(args.nodes * args.gpus_per_node)
    return None if args.world is None else int(args.world)


def node_problems(size: int, gpus_per_node: int) -> Iterator[Problem]:
    """Yield a problem if the job takes several nodes and one of them is not full."""
    if size > gpus_per_node > 0 and size % gpus_per_node:
        yield Problem(
            "the nodes are not full",
            "the job's GPUs by --gpus-per-node",
            f"{size} / {gpus_per_node}",
            f"a multiple of {gpus_per_node}, or one node of {size}",
        )


def rates(args: argparse.Namespace, config: RunConfig, gpu_gb: int) -> Rates:
    """Build the rates of an estimate from the options, in units of 1 and seconds."""
    card = CARDS.get(gpu_gb, CARDS[80])
    peak = card.fp32_tflops if config.policy.params == "fp32" else card.tflops
    return Rates(
        flops=(args.tflops or peak) * 1e12,
        mfu=args.mfu,
        hbm=(args.hbm or card.hbm) * 1e12,
        hbm_share=args.hbm_share,
        # A CUDA graph launches a whole step at once, whatever its number of layers.
        layer_launch_s=0.0 if config.kernels.cuda_graphs else args.launch_us * 1e-6,
        nvlink=args.nvlink * 1e9,
        nic=args.nic * 1e9,
    )


def lengths(args: argparse.Namespace, config: RunConfig) -> dict[str, Lengths]:
    """Return the two cases of the estimate: mean lengths, and all sequences at their limits."""
    limits = Lengths(config.task.max_prompt_tokens, config.rollout.max_response_tokens)
    mean = Lengths(
        args.mean_prompt or max(1.0, LENGTH_SHARE * limits.prompt),
        args.mean_response or max(1.0, LENGTH_SHARE * limits.response),
    )
    return {"mean": mean, "limit": limits}


def length_problems(args: argparse.Namespace, config: RunConfig) -> Iterator[Problem]:
    """Yield a problem for each mean length above the limit of a sequence."""
    for option, limit in (
        ("--mean-prompt", config.task.max_prompt_tokens),
        ("--mean-response", config.rollout.max_response_tokens),
    ):
        value = _value(args, option)
        if value is not None and value > limit:
            yield Problem("a mean above the limit", option, f"{value:g}", f"at most {limit}")


def sampled_per_kept(args: argparse.Namespace, config: RunConfig) -> float:
    """Return how many groups are sampled for each group of the batch."""
    dynamic = algorithm(config.algo.name).dynamic_sampling
    return args.sampled_per_kept or (SAMPLED_PER_KEPT if dynamic else 1.0)


def _value(args: argparse.Namespace, option: str) -> float | None:
    value: float | None = getattr(args, option.strip("-").replace("-", "_"))
    return value


def add(commands: Any) -> None:
    """Add the command to the parsers of commands."""
    plan = commands.add_parser(
        "plan", help="preflight: conflicts, memory, sync, time and cost of a run; no GPU needed"
    )
    arguments.add_recipe_arguments(plan)
    add_arguments(plan)
    plan.add_argument(
        "--all-sizes", action="store_true", help="a table of every size that the recipe is for"
    )
    plan.add_argument("--json", action="store_true", help="print the raw figures")
    # `judged`: `resolve` leaves the verdict on memory to this command.
    plan.set_defaults(run=_run, judged=True)


def _run(args: argparse.Namespace) -> int:
    if args.all_sizes:
        return _all_sizes(args)
    config = _resolve(args)
    if refused := list(platform.platform_problems(config, Choice("cuda", "a plan is for GPUs"))):
        raise UserError(refused)
    gpu_gb = arguments.gpu_gb(args)
    verdict = search.judge(config, gpu_gb)
    found = checks.of_run(
        verdict,
        args.gpus_per_node,
        rates(args, config, gpu_gb),
        lengths(args, config),
        sampled_per_kept(args, config),
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
    """Resolve the configuration for the size of job that the options ask for.

    Raises:
        UserError: lists all problems of the options and the configuration, and what would fit.
    """
    problems = list(job_problems(args))
    size = None if problems else world(args)
    if size is not None:
        _widen(args, size)
        problems += node_problems(size, args.gpus_per_node)
    try:
        config = arguments.resolve(args)
    except UserError as wrong:
        raise UserError([*problems, *wrong.problems, *_instead(args, wrong)]) from None
    if size is None:
        problems += node_problems(config.parallel.world_size, args.gpus_per_node)
    problems += length_problems(args, config)
    if problems:
        raise UserError(problems)
    return config


def _widen(args: argparse.Namespace, size: int) -> None:
    """Choose the recipe's layout for `size` GPUs, or its largest layout with fewer GPUs.

    A smaller layout keeps its sizes; more data parallelism and engine replicas fill the job.
    """
    import recipes

    args.gpus = None
    sized = recipes.sized(args.recipe)
    if sized is not None:
        gpu_gb = args.gpu_gb or sized.default.gpu_gb
        known = sorted(s.gpus for s in sized.layouts if s.gpu_gb == gpu_gb)
        room = [gpus for gpus in known if gpus <= size]
        args.gpus = room[-1] if room else size
        if args.gpus == size:
            return  # if no layout is that small, `recipes` reports which sizes there are
    args.overrides = [f"parallel.world_size={size}", *args.overrides]


def _instead(args: argparse.Namespace, wrong: UserError) -> list[Problem]:
    """Suggest the nearest layout that is valid and fits, if only the layout is wrong."""
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
    """Return the names of the layout's problems; nothing if a size is out of its range."""
    if any(problem.what == "value out of range" for problem in settings.settings_problems(config)):
        return set()
    return {problem.what for problem in layout_problems(config)}


def _all_sizes(args: argparse.Namespace) -> int:
    import recipes
    from recipes.layouts import SIZES

    problems = list(job_problems(args))
    sized = recipes.sized(args.recipe)
    if sized is None:
        known = "one of " + ", ".join(recipes.sized_names())
        problems.append(Problem("no table of sizes", "--all-sizes", str(args.recipe), known))
    if world(args) is not None:
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
            {"size": size, **(checks.figures(verdict) if verdict else {"refused": why})}
            for size, verdict, why in rows
        ]
        print(json.dumps(values, indent=2))
    else:
        print("\n".join(tables.sizes(rows)))
    return 0
