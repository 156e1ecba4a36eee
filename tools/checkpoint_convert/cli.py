"""The commands of the converter. torch is imported by the commands, not by `--help`."""

from __future__ import annotations

import argparse
import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from typing import cast as typed

from megatron_precision.config.errors import Problem, UserError, unknown_name
from megatron_precision.config.schema import ParallelConfig
from tools.checkpoint_convert.folders import program, refuse_arguments
from tools.checkpoint_convert.workers import Stopped, stoppable

if TYPE_CHECKING:
    from megatron_precision.precision.policy import DType
    from tools.checkpoint_convert.blocks import Source
    from tools.checkpoint_convert.verify import Loss

DTYPES = ("fp16", "bf16", "fp32")
# Any layout loads any cut; the ranks of this one read nothing but their own parts.
LAYOUT = {
    "tp": "tensor parallelism",
    "pp": "pipeline parallelism",
    "ep": "expert parallelism",
    "etp": "tensor parallelism inside an expert",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0, 1 where `verify` found a difference or `audit` a value that the dtype cannot hold, 2 for
        a mistake or a damaged checkpoint, 130 for Ctrl-C, 143 for SIGTERM, 141 where the reader of
        the output went away.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    args = argparse.Namespace()
    with stoppable():
        try:
            args = _parse(words)
            refuse_arguments(args)
            code = int(args.run(args))
            sys.stdout.flush()
            return code
        except UserError as wrong:
            print(wrong, file=sys.stderr)
            return 2
        except BrokenPipeError:  # the reader of a pipe, such as `head`, has what it wants
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 128 + signal.SIGPIPE
        except OSError as wrong:
            print(UserError(_file_problem(wrong, args)), file=sys.stderr)
            return 2
        except Stopped as stopped:
            word = "terminated" if stopped.number == signal.SIGTERM else "interrupted"
            print(word, file=sys.stderr)
            return 128 + stopped.number


def _file_problem(wrong: OSError, args: argparse.Namespace) -> Problem:
    """What the system says of a file; of a write it does not say which."""
    got = str(wrong.strerror or wrong).lower()
    if wrong.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Problem(
            "no room for the output", str(args.target), got, "room for all of it",
            "nothing is left of it: make room, and run it again",
        )  # fmt: skip
    where = str(wrong.filename or getattr(args, "target", "a file"))
    return Problem("a file cannot be used", where, got, "a usable file or folder")


def _parse(words: list[str]) -> argparse.Namespace:
    parser, commands = _parser()
    if words and not words[0].startswith("-") and words[0] not in commands:
        raise UserError(unknown_name("command", "COMMAND", words[0], commands))
    return parser.parse_args(words)


def _parser() -> tuple[argparse.ArgumentParser, list[str]]:
    """The parser, and the names of its commands."""
    parser = argparse.ArgumentParser(
        prog=program(),
        description="Hugging Face checkpoints to Megatron's torch_dist format and back.",
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, text, run in (
        ("import", "Hugging Face to Megatron", _import),
        ("export", "Megatron to Hugging Face", _export),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("source", metavar="FROM")
        command.add_argument("target", metavar="TO", help="a new folder")
        command.add_argument("--dtype", choices=DTYPES, help="default: each tensor keeps its own")
        command.add_argument(
            "--allow-overflow", action="store_true", help="clamp what the dtype cannot hold"
        )
        command.add_argument(
            "--workers", type=int, default=1, metavar="N", help="processes; default: 1"
        )
        if name == "export":
            _add_config(command)
        else:
            for size, what in LAYOUT.items():
                command.add_argument(
                    f"--{size}", type=int, default=1, metavar="N", help=f"cut for this {what}"
                )
        command.set_defaults(run=run, command=name)

    verify = commands.add_parser("verify", help="compare two checkpoints, bit for bit")
    verify.add_argument("first", metavar="A")
    verify.add_argument("second", metavar="B")
    verify.add_argument(
        "--logits",
        action="store_true",
        help="also forward both, one with transformers and one with Megatron Core",
    )
    verify.add_argument(
        "--dtype", choices=DTYPES, help="compare both as a conversion with --dtype would write them"
    )
    _add_config(verify)
    verify.set_defaults(run=_verify)

    inspect = commands.add_parser("inspect", help="what a checkpoint holds")
    inspect.add_argument("folder", metavar="DIR")
    _add_config(inspect)
    inspect.set_defaults(run=_inspect)

    audit = commands.add_parser("audit", help="what a dtype would cost, without writing anything")
    audit.add_argument("folder", metavar="DIR")
    audit.add_argument("--dtype", choices=DTYPES, required=True)
    _add_config(audit)
    audit.set_defaults(run=_audit)
    return parser, list(commands.choices)


def _add_config(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--config",
        metavar="HF_DIR",
        help="the configuration of a Megatron checkpoint that carries none",
    )


def _import(args: argparse.Namespace) -> int:
    from tools.checkpoint_convert.convert import import_checkpoint
    from tools.checkpoint_convert.source import open_source

    source = open_source(args.source)
    _say_defaults(source)
    with _progress(sum(info.bytes for info in source.tensors.values())) as told:
        part = import_checkpoint(
            args.source,
            args.target,
            _dtype(args.dtype),
            args.allow_overflow,
            told,
            ParallelConfig(1, args.tp, args.pp, args.ep, args.etp, rollout_tp_size=1),
            args.workers,
        )
    return _done(args.target, part.losses)


def _export(args: argparse.Namespace) -> int:
    from tools.checkpoint_convert.convert import export_checkpoint
    from tools.checkpoint_convert.source import open_source

    source = open_source(args.source, args.config)
    _say_defaults(source)
    with _progress(sum(info.bytes for info in source.tensors.values())) as told:
        part = export_checkpoint(
            args.source,
            args.target,
            _dtype(args.dtype),
            args.allow_overflow,
            told,
            args.config,
            args.workers,
        )
    return _done(args.target, part.losses)


def _verify(args: argparse.Namespace) -> int:
    from tools.checkpoint_convert.source import open_source
    from tools.checkpoint_convert.verify import compare

    source = open_source(args.first, args.config)
    with _progress(sum(info.bytes for info in source.tensors.values())) as told:
        found = compare(args.first, args.second, args.config, _dtype(args.dtype), told)
    for difference in found.differences:
        print(difference)
    differ = len(found.differences)
    damaged = f", {len(found.damaged)} damaged" if found.damaged else ""
    print(f"{found.compared} tensors compared, {differ} difference{'s' * (differ != 1)}{damaged}")
    if found.damaged:
        raise UserError(found.damaged)
    wrong = bool(found.differences)
    if args.logits:
        from tools.checkpoint_convert.logits import TOLERANCE, compare_logits

        logits = compare_logits(args.first, args.second, args.config)
        kind = "tokens of text" if logits.from_text else "random tokens"
        print(
            f"log-probs of {logits.tokens} {kind}: largest difference {logits.largest:.2e} nats, "
            f"mean {logits.mean:.2e}, the same choice at {logits.same_choice:.1%}"
        )
        wrong |= logits.largest > TOLERANCE
    return 1 if wrong else 0


def _inspect(args: argparse.Namespace) -> int:
    from tools.checkpoint_convert.source import open_source

    source = open_source(args.folder, args.config)
    for name, info in source.tensors.items():
        print(f"{name}  {str(info.dtype).removeprefix('torch.')}  {list(info.shape)}")
    size = sum(info.bytes for info in source.tensors.values())
    hashed = "hashes of every tensor" if source.manifest else "no manifest"
    print(
        f"\n{source.model.model_type}, {len(source.tensors)} tensors, {size / 2**30:.3f} GiB, "
        f"{hashed}"
    )
    _say_defaults(source)
    return 0


def _audit(args: argparse.Namespace) -> int:
    from tools.checkpoint_convert.blocks import Scratch
    from tools.checkpoint_convert.source import checked_blocks, open_source
    from tools.checkpoint_convert.verify import Loss, cast

    source, dtype = open_source(args.folder, args.config), _dtype(args.dtype)
    assert dtype is not None
    losses: dict[str, Loss] = {}
    scratch = Scratch()
    with _progress(sum(info.bytes for info in source.tensors.values())) as told:
        for name in source.tensors:
            losses[name] = Loss()
            for block in checked_blocks(source, name):
                cast(block, scratch.take(tuple(block.shape), dtype), losses[name])
                told(block.nbytes)
    _print_losses(losses)
    return 1 if any(loss.overflowed or loss.nonfinite for loss in losses.values()) else 0


def _say_defaults(source: Source) -> None:
    """Name what config.json leaves out and the weights' meaning hangs on."""
    from megatron_precision.layouts.hf_config import defaults_taken

    for name, value in defaults_taken(source.sidecar / "config.json").items():
        print(f"config.json has no {name}: {value}, as transformers takes it")


def _done(target: Path, losses: dict[str, Loss]) -> int:
    if losses:
        _print_losses(losses)
    print(f"written: {target}")
    return 0


def _print_losses(losses: dict[str, Loss]) -> None:
    hurt = {n: loss for n, loss in losses.items() if loss.any or loss.subnormal or loss.nonfinite}
    if hurt:
        print(
            f"{'inf or nan':>12}{'overflowed':>12}{'zeroed':>12}{'subnormal':>12}{'changed':>14}"
            f"{'rel. error':>12}"
        )
    for name, loss in hurt.items():
        print(
            f"{loss.nonfinite:>12,}{loss.overflowed:>12,}{loss.zeroed:>12,}{loss.subnormal:>12,}"
            f"{loss.changed:>14,}{loss.relative_error:>12.2e}  {name}"
        )
    print(f"{len(hurt)} of {len(losses)} tensors are changed, or hold subnormal, inf or nan values")


def _dtype(name: str | None):  # type: ignore[no-untyped-def]
    from megatron_precision.precision.dtypes import torch_dtype

    return torch_dtype(typed("DType", name)) if name else None


@contextlib.contextmanager
def _progress(total: int) -> Iterator[Callable[[int], None]]:
    """A bar with bytes, rate and time left on a terminal, nothing elsewhere."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    columns = (BarColumn(), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task("", total=total)
        yield lambda count: bar.update(task, advance=count)
