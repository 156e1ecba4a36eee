"""The command `sync-bench`: its arguments, and what they ask for."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_precision.config.errors import Problem, UserError
from megatron_precision.preflight import sync
from megatron_precision.sync.plan import Planner, cell_elements_of


def add(commands: Any) -> None:
    """Add the command to the parsers of commands."""
    bench = commands.add_parser("sync-bench", help="what a weight sync moves between two layouts")
    add_layout_arguments(bench)
    bench.add_argument(
        "--nvlink", type=float, default=450.0, metavar="GB/S", help="of a rank, one way"
    )
    bench.add_argument("--nic", type=float, default=50.0, metavar="GB/S", help="of a rank, one way")
    bench.set_defaults(run=_run)


def add_layout_arguments(bench: argparse.ArgumentParser) -> None:
    """Add the arguments that `requested_planner` reads."""
    bench.add_argument(
        "--model", required=True, help="qwen3-14b, qwen3-30b-a3b, qwen3-235b-a22b, or a folder"
    )
    bench.add_argument("--train", default="tp=1", metavar="SIZES", help="tp, pp, ep, etp, dp: tp=8")
    bench.add_argument("--rollout", default="tp=1", metavar="SIZES", help="tp, dp, ep: tp=2,dp=4")
    bench.add_argument("--world", type=int, metavar="N", help="ranks of either side")
    bench.add_argument("--apart", action="store_true", help="engines on ranks of their own")
    bench.add_argument("--ranks-per-node", type=int, default=8, metavar="N", help="default: 8")
    bench.add_argument("--wire", choices=("fp16", "bf16", "fp32"), default="fp16")
    bench.add_argument("--batch-mib", type=int, default=64, metavar="N", help="default: 64")
    bench.add_argument("--layers", type=int, metavar="N", help="of the model's; default: all")
    bench.add_argument("--vocab-rows", type=int, metavar="N", help="of the model's; default: all")
    bench.add_argument("--json", action="store_true", help="print the raw figures")


def _run(args: argparse.Namespace) -> int:
    planner = requested_planner(args, nvlink=args.nvlink, nic=args.nic)
    rates = sync.Rates(args.nvlink * 1e9, args.nic * 1e9)
    itemsize = 4 if args.wire == "fp32" else 2
    return sync.run(planner, itemsize, args.batch_mib * 2**20, rates, args.json)


def requested_planner(args: argparse.Namespace, **numbers: float) -> Planner:
    """Build the planner of the layouts that the arguments ask for.

    Args:
        numbers: further numbers that must be positive, by their options' names.

    Raises:
        UserError: lists every mistake, of numbers, model and sizes.
    """
    problems: list[Problem] = []
    model = planner = None
    with sync.collecting(problems):
        sync.refuse_numbers(
            world=args.world,
            ranks_per_node=args.ranks_per_node,
            batch_mib=args.batch_mib,
            layers=args.layers,
            vocab_rows=args.vocab_rows,
            **numbers,
        )
    wrong = {problem.where for problem in problems}
    with sync.collecting(problems):
        model = sync.in_small(sync.model_of(args.model), args.layers, args.vocab_rows)
    with sync.collecting(problems):
        if model is None or wrong & {"--world", "--layers", "--vocab-rows"}:
            # Whether sizes divide what is not known cannot be said.
            sync.sizes_of(args.train, args.rollout)
        else:
            planner = sync.planner_of(
                model,
                args.train,
                args.rollout,
                args.world,
                args.ranks_per_node,
                args.apart,
                cell_elements_of(args.batch_mib * 2**20),
            )
    if problems:
        raise UserError(problems)
    assert planner is not None, "there is one unless there is a problem"
    return planner
