"""Carry out a sync between two layouts on made-up weights, beside a full gather and a plain copy.

    python -m benchmarks.sync --model qwen3-14b --layers 2 --train tp=2 --rollout tp=1,dp=2

It starts its processes here, or takes those of torchrun. `sync-bench` plans the same without
carrying it out, for any number of ranks.
"""

from __future__ import annotations

import argparse
import sys

from benchmarks.sync import job
from megatron_precision.cli.sync_bench import add_layout_arguments, requested_planner
from megatron_precision.config.errors import UserError
from megatron_precision.launch import rank


def main(words: list[str]) -> int:
    """Measure, and print a table or JSON; exit code 2 for a mistake of the user."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sync", description=str(__doc__).splitlines()[0]
    )
    add_layout_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    args = parser.parse_args(words)
    try:
        planner = requested_planner(args, rounds=args.rounds)
        bench = job.Bench(planner, args.wire, args.batch_mib * 2**20, args.rounds, args.json)
        return job.run(bench, words)
    except UserError as wrong:
        rank.show_user_error(wrong)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
