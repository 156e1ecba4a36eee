"""The command `sync-bench`: its arguments, and what they ask for."""

from __future__ import annotations

import argparse
from typing import Any

from megatron_precision.errors import Problem, UserError
from megatron_precision.sync_bench import layouts, planned
from megatron_precision.weights.plan import Planner, cell_elements_of


def add(commands: Any) -> None:
    """Add the command to the parsers of commands."""
    bench = commands.add_parser("sync-bench", help="what a weight sync moves between two layouts")
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
    bench.add_argument(
        "--nvlink", type=float, default=450.0, metavar="GB/S", help="of a rank, one way"
    )
    bench.add_argument("--nic", type=float, default=50.0, metavar="GB/S", help="of a rank, one way")
    bench.add_argument(
        "--execute",
        action="store_true",
        help="carry it out on made-up weights, beside a full gather and a plain copy; starts its "
        "processes here, or takes those of torchrun",
    )
    bench.add_argument("--layers", type=int, metavar="N", help="of the model's; default: all")
    bench.add_argument("--vocab-rows", type=int, metavar="N", help="of the model's; default: all")
    bench.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    bench.add_argument("--json", action="store_true", help="print the raw figures")
    bench.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    planner, batch_bytes = _planner(args), args.batch_mib * 2**20
    if args.execute:
        from megatron_precision.sync_bench import job

        bench = job.Bench(planner, args.wire, batch_bytes, args.rounds, args.json)
        return job.run(bench, args.words)
    rates = planned.Rates(args.nvlink * 1e9, args.nic * 1e9)
    itemsize = 4 if args.wire == "fp32" else 2
    return planned.run(planner, itemsize, batch_bytes, rates, args.json)


def _planner(args: argparse.Namespace) -> Planner:
    """The layouts that the arguments ask for.

    Raises:
        UserError: lists every mistake, of numbers, model and sizes.
    """
    problems: list[Problem] = []
    model = planner = None
    with layouts.collecting(problems):
        layouts.refuse_numbers(
            world=args.world,
            ranks_per_node=args.ranks_per_node,
            batch_mib=args.batch_mib,
            nvlink=args.nvlink,
            nic=args.nic,
            layers=args.layers,
            vocab_rows=args.vocab_rows,
            rounds=args.rounds,
        )
    wrong = {problem.where for problem in problems}
    with layouts.collecting(problems):
        model = layouts.in_small(layouts.model_of(args.model), args.layers, args.vocab_rows)
    with layouts.collecting(problems):
        if model is None or wrong & {"--world", "--layers", "--vocab-rows"}:
            # Whether sizes divide what is not known cannot be said.
            layouts.sizes_of(args.train, args.rollout)
        else:
            planner = layouts.planner_of(
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
