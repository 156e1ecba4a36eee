"""`python -m megatron_precision replay DUMP`: score an iteration again, and say where it parts."""

from __future__ import annotations

import argparse
import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_precision.checks import settings
from megatron_precision.cli.layouts import replay_layout
from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.overrides import config_from_dict
from megatron_precision.config.schema import RunConfig, StartConfig, TaskConfig
from megatron_precision.launch import rank
from megatron_precision.launch.jobs import torchrun_line
from megatron_precision.precision.policy import DTYPES
from megatron_precision.replay.findings import layout_words

if TYPE_CHECKING:
    from megatron_precision.observe.dump import Dump


def add(commands: Any) -> None:
    """Add the command to the parsers of commands."""
    parser = commands.add_parser(
        "replay", help="score a dumped iteration again, and say where trainer and engine part"
    )
    parser.add_argument("dump", type=Path, metavar="DUMP", help="such as RUN/dumps/000012")
    parser.add_argument(
        "--precision", choices=DTYPES, help="of the trainer; default: the run's own"
    )
    parser.add_argument(
        "--layout", metavar="SIZES", help="tp, pp, ep, etp, dp, sp: tp=2,pp=1; default: the run's"
    )
    parser.add_argument(
        "--model", type=Path, metavar="DIR", help="weights, where the dump holds none; or others"
    )
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="default: a folder in DUMP; figures are replaced"
    )
    parser.set_defaults(run=_run)


def _run(args: argparse.Namespace) -> int:
    from megatron_precision.observe.dump import read_dump

    dump = read_dump(args.dump)
    config, weights = resolve(dump, args.precision, args.layout, args.model)
    ranks = config.parallel.world_size
    if ranks > 1 and "WORLD_SIZE" not in os.environ:
        rank.become_launcher(ranks, args.words)
    rank.require_world(config, torchrun_line(ranks, args.words))
    name = f"replay-{config.precision}-{layout_words(config.parallel)}"
    out = args.out or args.dump / name.replace("=", "").replace(",", "-")

    def work() -> None:
        from megatron_precision.platform import startup

        startup.start(config.seed)
        import torch.distributed as dist

        from megatron_precision.layouts.hf_files import OpenCheckpoint
        from megatron_precision.replay import report, scoring
        from megatron_precision.replay import report as files

        scored = scoring.score(config, dump.arrays, OpenCheckpoint(weights))
        if rank.number() == 0:
            found = report.Replay.of(dump, config, str(args.model or ""), scored)
            files.write(found, out)
            print("\n".join(found.lines()))
            print(f"\nfigures: {out / files.FIGURES}, picture: {out / files.PICTURE}")
        dist.barrier()
        dist.destroy_process_group()  # gloo's threads may not outlive it

    return rank.run(work, out)


def resolve(
    dump: Dump, precision: str | None, layout: str | None, model: Path | None
) -> tuple[RunConfig, Path]:
    """Return the configuration of the replay, and the folder of its weights.

    Args:
        precision: of the trainer; None for the run's own.
        layout: as a user writes it; None for the run's own.
        model: weights in place of the dump's own.

    Raises:
        UserError: lists everything that is wrong.
    """
    from megatron_precision.checks import inputs

    config = config_from_dict(dump.header.config)
    problems: list[Problem] = []
    try:
        parallel = config.parallel if layout is None else replay_layout(layout, config)
    except UserError as wrong:
        parallel, problems = config.parallel, list(wrong.problems)
    config = dataclasses.replace(
        config,
        precision=precision or config.policy.params,
        # No engine is started: its layout is that of one which always fits.
        parallel=dataclasses.replace(parallel, rollout_tp_size=1),
    )
    if not problems:
        found = settings.settings_problems(config)
        problems = [problem for problem in found if not problem.where.startswith("rollout.")]
    weights = model or dump.weights
    if weights is None:
        problems.append(
            Problem(
                "the dump holds no weights", str(dump.folder), "a model above dump_weights_gib",
                "a Hugging Face folder of the weights that sampled it", "--model DIR",
            )
        )  # fmt: skip
    else:
        start = StartConfig("checkpoint", str(weights))
        on_weights = dataclasses.replace(config, start=start, task=TaskConfig())
        problems += inputs.input_problems(on_weights, training=False)
    if problems or weights is None:
        raise UserError(problems)
    return config, weights
