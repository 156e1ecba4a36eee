"""What the user says of the job and its machines: the size, and the rates of an estimate."""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_precision.config import RunConfig
from megatron_precision.errors import Problem
from megatron_precision.planning.estimate import Rates
from megatron_precision.planning.work import Lengths
from megatron_precision.rl.algorithms import ALGORITHMS

# Larger worlds are typing errors.
MOST_RANKS = 2**16


@dataclass(frozen=True)
class Card:
    """A GPU by its data sheet: dense TFLOP/s of 16-bit and of FP32 products, HBM in TB/s."""

    name: str
    tflops: float
    fp32_tflops: float
    hbm: float


# Source: NVIDIA's data sheets of H100 SXM and H200 SXM; without sparsity.
CARDS = {80: Card("H100 SXM", 989.0, 67.0, 3.35), 141: Card("H200 SXM", 989.0, 67.0, 4.8)}
# Lengths that no option gives are this share of their limits; the recipes' own estimates take
# 5,000 of 20,480.
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
    """The job's size, and what the estimate assumes."""
    size = parser.add_argument_group("the job")
    size.add_argument("--nodes", type=int, metavar="N", help="of --gpus-per-node each")
    size.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="default: 8")
    size.add_argument("--world", type=int, metavar="N", help="GPUs in all; the recipe's by default")
    rates = parser.add_argument_group("what the estimate assumes")
    for option, default, unit, text in _RATES:
        rates.add_argument(option, type=float, default=default, metavar=unit, help=text)


def problems(args: argparse.Namespace) -> Iterator[Problem]:
    """Every option that is out of its range, or at odds with another."""
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
    """GPUs in all that the options name, if they do."""
    if args.nodes is not None:
        return int(args.nodes * args.gpus_per_node)
    return args.world  # type: ignore[no-any-return]


def node_problems(size: int, gpus_per_node: int) -> Iterator[Problem]:
    """A job of several nodes that are not all full."""
    if size > gpus_per_node > 0 and size % gpus_per_node:
        yield Problem(
            "the nodes are not full",
            "the job's GPUs by --gpus-per-node",
            f"{size} / {gpus_per_node}",
            f"a multiple of {gpus_per_node}, or one node of {size}",
        )


def rates(args: argparse.Namespace, config: RunConfig, gpu_gb: int) -> Rates:
    """The rates that the options name, in units of 1."""
    card = CARDS.get(gpu_gb, CARDS[80])
    peak = card.fp32_tflops if config.policy.params == "fp32" else card.tflops
    return Rates(
        flops=(args.tflops or peak) * 1e12,
        mfu=args.mfu,
        hbm=(args.hbm or card.hbm) * 1e12,
        hbm_share=args.hbm_share,
        # A replayed step is launched once, whatever its layers.
        layer_launch_s=0.0 if config.kernels.cuda_graphs else args.launch_us * 1e-6,
        nvlink=args.nvlink * 1e9,
        nic=args.nic * 1e9,
    )


def lengths(args: argparse.Namespace, config: RunConfig) -> dict[str, Lengths]:
    """What to estimate for: the mean lengths, and the limits, which nothing exceeds."""
    limits = Lengths(config.task.max_prompt_tokens, config.rollout.max_response_tokens)
    mean = Lengths(
        args.mean_prompt or max(1.0, LENGTH_SHARE * limits.prompt),
        args.mean_response or max(1.0, LENGTH_SHARE * limits.response),
    )
    return {"mean": mean, "limit": limits}


def length_problems(args: argparse.Namespace, config: RunConfig) -> Iterator[Problem]:
    """Mean lengths above what a sequence may have."""
    for option, limit in (
        ("--mean-prompt", config.task.max_prompt_tokens),
        ("--mean-response", config.rollout.max_response_tokens),
    ):
        value = _value(args, option)
        if value is not None and value > limit:
            yield Problem("a mean above the limit", option, f"{value:g}", f"at most {limit}")


def sampled_per_kept(args: argparse.Namespace, config: RunConfig) -> float:
    """Groups sampled for one of the batch."""
    dynamic = ALGORITHMS[config.algo.name].dynamic_sampling
    return args.sampled_per_kept or (SAMPLED_PER_KEPT if dynamic else 1.0)


def _value(args: argparse.Namespace, option: str) -> float | None:
    value: float | None = getattr(args, option.strip("-").replace("-", "_"))
    return value
