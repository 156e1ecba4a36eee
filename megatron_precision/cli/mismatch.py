"""The command `mismatch`: measures the training-inference mismatch of any checkpoint, by dtype.

It reproduces figure 5 of the paper. Each part of the comparison (`mismatch/comparison.py`) is its
own torchrun world, one after the other; the same command resumes a comparison that was stopped.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_precision.checkpoint import run_folder
from megatron_precision.checks import inputs, settings
from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.overrides import apply, config_from_file
from megatron_precision.launch import local, rank
from megatron_precision.launch.jobs import Job, torchrun_line
from megatron_precision.mismatch import smollm2
from megatron_precision.precision.policy import DTYPES, DType

if TYPE_CHECKING:
    from megatron_precision.mismatch.comparison import Comparison, Side

PART = "mismatch-part"  # the hidden command that this command's jobs run
QUESTIONS = Path(__file__).resolve().parents[1] / "mismatch" / "questions.jsonl"
COMPARISON = "comparison.json"
PROGRESS = "progress.json"
NAMES: dict[Side, str] = {"sample": "vLLM samples", "score": "Megatron scores"}


def add(commands: Any) -> None:
    """Add the command, and the hidden command that runs its parts, to the subparsers."""
    parser = commands.add_parser(
        "mismatch", help="training-inference mismatch of any checkpoint: dtypes against dtypes"
    )
    parser.add_argument(
        "--model", required=True, metavar="DIR", help="a Hugging Face folder, or smollm2"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder")
    parser.add_argument(
        "--prompts", type=Path, metavar="FILE", help=".jsonl or .parquet; by default 16 questions"
    )
    parser.add_argument(
        "--train", default="bf16,fp16,fp32", metavar="LIST", help="trainer's dtypes"
    )
    parser.add_argument(
        "--rollout", default="bf16,fp16,fp32", metavar="LIST", help="engine's dtypes"
    )
    parser.add_argument("--num-prompts", type=int, default=16, metavar="N", help="default: 16")
    parser.add_argument("--rollouts", type=int, default=4, metavar="N", help="a prompt; default: 4")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="default: 256")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="default: 1")
    parser.add_argument("--ranks", type=int, metavar="N", help="processes; default: one a device")
    parser.add_argument("--seed", type=int, default=42, metavar="N")
    parser.add_argument(
        "--set", dest="overrides", metavar="PATH=VALUE", nargs="+", action="extend", default=[],
        help="typed overrides, for example parallel.tp_size=4 memory.attention=fused",
    )  # fmt: skip
    parser.add_argument(
        "--dryrun", "--dry-run", action="store_true", help="print what would run, and stop"
    )
    parser.set_defaults(run=_run)
    part = commands.add_parser(PART)
    part.add_argument("--config", type=Path, required=True)
    part.add_argument("--side", choices=tuple(NAMES), required=True)
    part.add_argument("--dtype", choices=DTYPES, required=True)
    part.set_defaults(run=_run_part)


def _run(args: argparse.Namespace) -> int:
    comparison = _comparison(args)
    if args.dryrun:
        for side, dtype in comparison.parts():
            line = torchrun_line(*_line(comparison, side, dtype))
            print(f"{NAMES[side]} in {dtype}: {line}")
        return 0
    with local.exclusive(args.out.with_name(args.out.name + ".lock")):
        args.out.mkdir(parents=True, exist_ok=True)
        began_s = time.monotonic()
        code = _run_parts(comparison)
        if code:
            return code
        from megatron_precision.mismatch import report

        print(report.write(comparison))
        print(f"\nreport: {args.out / 'report.html'}\nall of it took {local.elapsed(began_s)}")
    return 0


def _comparison(args: argparse.Namespace) -> Comparison:
    """Build the comparison that the arguments ask for, and check it.

    Raises:
        UserError: lists all problems of the arguments.
    """
    # Not at the top: it imports NumPy, which would slow `--help` down.
    from megatron_precision.mismatch.comparison import Comparison, base_config

    problems: list[Problem] = []
    train = _dtypes("--train", args.train, problems)
    rollout = _dtypes("--rollout", args.rollout, problems)
    for option in ("num_prompts", "rollouts", "max_tokens"):
        if getattr(args, option) < 1:
            where = "--" + option.replace("_", "-")
            problems.append(
                Problem("nothing to sample", where, str(getattr(args, option)), "1 or more")
            )
    if args.out.exists() and not args.out.is_dir():
        problems.append(Problem("not a folder", "--out", str(args.out), "a folder"))
    prompts = args.prompts or QUESTIONS
    model_dir = args.out / smollm2.NAME if args.model == "smollm2" else Path(args.model)
    try:
        if args.model == "smollm2" and not problems:
            smollm2.package_folder()
            args.out.mkdir(parents=True, exist_ok=True)
            smollm2.write(model_dir)
        config = base_config(
            model_dir, prompts, ranks=args.ranks or _devices(), max_tokens=args.max_tokens,
            temperature=args.temperature, seed=args.seed,
        )  # fmt: skip
        config = apply(config, args.overrides)
        problems += settings.settings_problems(config) + inputs.input_problems(config)
    except UserError as wrong:
        raise UserError([*problems, *wrong.problems]) from None
    if problems:
        raise UserError(problems)
    return Comparison(config, train, rollout, args.num_prompts, args.rollouts, args.out)


def _dtypes(option: str, text: str, problems: list[Problem]) -> tuple[DType, ...]:
    """Parse a comma-separated list of dtypes; `problems` is extended by the unknown ones."""
    names = [name.strip() for name in text.split(",")]
    unknown = [name for name in names if name not in DTYPES]
    if unknown:
        problems.append(Problem("an unknown dtype", option, ",".join(unknown), ", ".join(DTYPES)))
    return tuple(dtype for name in dict.fromkeys(names) for dtype in DTYPES if dtype == name)


def _devices() -> int:
    """Return the number of GPUs; without a GPU, the number of cores, at most 2."""
    import torch

    return torch.cuda.device_count() or min(2, len(os.sched_getaffinity(0)))


# ---- the parts ---------------------------------------------------------------------------


def _line(comparison: Comparison, side: Side, dtype: DType) -> tuple[int, list[str]]:
    folder = comparison.part_folder(side, dtype)
    words = [PART, "--config", str(folder / run_folder.CONFIG)]
    return comparison.config.parallel.world_size, [*words, "--side", side, "--dtype", dtype]


def _run_parts(comparison: Comparison) -> int:
    """Run the parts that are not done yet; return the exit code of the first that failed, or 0."""
    parts = list(comparison.parts())
    with _bar(comparison.out / PROGRESS, len(parts)) as begin:
        for side, dtype in parts:
            begin(f"{NAMES[side]} in {dtype}")
            folder = comparison.part_folder(side, dtype)
            folder.mkdir(parents=True, exist_ok=True)
            run_folder.write_config(comparison.of(dtype), folder)
            _write_comparison(comparison, folder)
            extra = ("--side", side, "--dtype", dtype)
            ranks = comparison.config.parallel.world_size
            began_s = time.monotonic()
            code = local.run_job(Job(PART, extra, ranks, folder))
            if code:
                return code
            comparison.took_file(side, dtype).write_text(
                json.dumps(time.monotonic() - began_s), encoding="ascii"
            )
    (comparison.out / PROGRESS).unlink(missing_ok=True)
    return 0


def _write_comparison(comparison: Comparison, folder: Path) -> None:
    values = dataclasses.asdict(comparison) | {"out": str(comparison.out)}
    del values["config"]
    (folder / COMPARISON).write_text(json.dumps(values), encoding="utf-8")


def _run_part(args: argparse.Namespace) -> int:
    from megatron_precision.mismatch.comparison import Comparison

    config = config_from_file(args.config)
    folder = args.config.parent
    values = json.loads((folder / COMPARISON).read_text(encoding="utf-8"))
    comparison = Comparison(
        config=config,
        train=tuple(values["train"]),
        rollout=tuple(values["rollout"]),
        num_prompts=values["num_prompts"],
        rollouts=values["rollouts"],
        out=Path(values["out"]),
    )

    def work() -> None:
        from megatron_precision.platform import startup

        startup.start(config.seed)
        from megatron_precision.mismatch import parts

        progress = parts.progress_writer(comparison.out / PROGRESS)
        (parts.sample if args.side == "sample" else parts.score)(comparison, args.dtype, progress)

    return rank.run(work, folder)


@contextmanager
def _bar(path: Path, parts: int) -> Iterator[Any]:
    """Show a progress bar over all parts; rank 0 writes the share that it has done to `path`."""
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
    )
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bar:
        task = bar.add_task("starting", total=max(1, parts))
        begun = [0]
        ended = threading.Event()

        def begin(text: str) -> None:
            path.unlink(missing_ok=True)
            begun[0] += 1
            bar.update(task, description=text, completed=begun[0] - 1)

        def follow() -> None:
            while not ended.wait(1.0):
                if begun[0] and (share := _share(path)) is not None:
                    bar.update(task, completed=begun[0] - 1 + share)

        thread = threading.Thread(target=follow, daemon=True)
        thread.start()
        try:
            yield begin
        finally:
            ended.set()
            thread.join()
        bar.update(task, description="done", completed=max(1, parts))


def _share(path: Path) -> float | None:
    """Return the share that a part has done; None before it is written and while it is."""
    try:
        return float(json.loads(path.read_text(encoding="ascii")))
    except (FileNotFoundError, ValueError):
        return None
