"""Implements `launch.py`: resolves its command line once and starts the jobs that it describes."""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import inspect
import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import recipes
from megatron_precision.checkpoint import run_folder
from megatron_precision.checks import inputs, platform
from megatron_precision.cli import arguments
from megatron_precision.cli.train import nothing_left, plan, print_plan
from megatron_precision.config import user_files
from megatron_precision.config.errors import Problem, UserError, nearest
from megatron_precision.config.schema import RunConfig, to_dict
from megatron_precision.launch import elsewhere, local, mounts, options, slurm
from megatron_precision.launch.jobs import Job, prepare_job, train_job
from megatron_precision.launch.options import Options
from megatron_precision.platform.choice import choose

# A dry run shows this for a run folder that was not named.
NO_FOLDER = Path("DIR")


def main(argv: Sequence[str]) -> int:
    """Run `launch.py` with the words of its command line.

    Returns:
        The job's exit code; 2 for a user error, 130 after Ctrl-C.
    """
    try:
        args, problems = parse(argv)
        if args.list:
            for name, recipe in recipes.RECIPES.items():
                print(f"{name:<28}{(inspect.getdoc(recipe.function) or '').splitlines()[0]}")
            return 0
        return _launch(args, problems)
    except UserError as wrong:
        print(wrong, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


def _launch(args: argparse.Namespace, problems: list[Problem]) -> int:
    config: RunConfig | None = None
    try:
        config = arguments.resolve(args)
    except UserError as wrong:
        problems += wrong.problems
    launch, found = options.resolve(args, config)
    problems += found
    if config is not None:
        problems += _missing(args, config, launch)
    if problems or config is None or launch is None:
        raise UserError(problems)
    if args.dryrun:
        _print_dry_run(args, config, launch)
        return 0
    if launch.executor == "local":
        return _run_here(args, config)
    return _run_elsewhere(args, config, launch)


def _missing(
    args: argparse.Namespace, config: RunConfig, launch: Options | None
) -> Iterator[Problem]:
    """Yield a problem for everything that the launch needs and does not find."""
    if launch is not None and launch.executor == "slurm":
        yield from slurm.slurm_problems(args.out or NO_FOLDER, launch)
    if launch is not None:
        yield from elsewhere.executor_problems(launch)
        if launch.executor in elsewhere.REMOTE and config.start.kind == "warm_start":
            yield Problem(
                "a warm start is in the cache of one machine", f"--executor {launch.executor}",
                config.recipe, "a recipe that starts from a checkpoint", "--model DIR is one way",
            )  # fmt: skip
        if launch.executor in elsewhere.REMOTE:
            for path in user_files.files(config):
                yield Problem(
                    "a file of this machine, which the job does not see", "algo.name, task.scorer",
                    str(path), "MODULE:FUNCTION of the image for a scorer, a built-in algorithm",
                )  # fmt: skip
    if args.dryrun:
        return
    if importlib.util.find_spec("nemo_run") is None:
        yield Problem(
            "nemo-run is not installed for this Python", sys.executable, "no module nemo_run",
            "the project's environment", "make install, then .venv/bin/python launch.py ...",
        )  # fmt: skip
    if launch is not None and launch.executor == "slurm":
        yield from slurm.require_slurm(launch)
    if launch is not None and launch.executor == "local":  # another machine's platform is unknown
        yield from platform.platform_problems(config, choose())
    if config.start.kind == "checkpoint":
        yield from inputs.input_problems(_as_on_host(config, launch))


def _as_on_host(config: RunConfig, launch: Options | None) -> RunConfig:
    """Translate the container paths of the configuration to host paths."""
    if launch is None or not launch.mounts:
        return config

    def moved(texts: tuple[str, ...]) -> tuple[str, ...]:
        parts = [text.partition("=") for text in texts]
        return tuple(f"{name}={mounts.on_host(path, launch.mounts)}" for name, _, path in parts)

    start, task = config.start, config.task
    return dataclasses.replace(
        config,
        start=dataclasses.replace(start, checkpoint=mounts.on_host(start.checkpoint, launch.mounts))
        if start.checkpoint
        else start,
        task=dataclasses.replace(
            task, train_sets=moved(task.train_sets), eval_sets=moved(task.eval_sets)
        ),
    )


def _run_here(args: argparse.Namespace, config: RunConfig) -> int:
    out = args.out
    if args.resume and nothing_left(config, out):
        return 0
    run_folder.claim(out, args.overwrite, args.resume)
    run_folder.write_config(config, out)
    if args.start_from is None and config.start.kind == "warm_start":
        code = local.ensure_start(config)
        if code:
            _release(args)
            return code
    code = local.run_job(train_job(config, out, _extra(args)))
    if code == 0:
        print(f"run folder: {out}")
    return code


def _run_elsewhere(args: argparse.Namespace, config: RunConfig, launch: Options) -> int:
    out = args.out
    jobs = _jobs(args, config, out)
    if launch.executor in elsewhere.REMOTE:  # --out is a path on the remote side
        return elsewhere.run(jobs, config, launch, Path("runs") / "launcher")
    if args.resume and nothing_left(config, out):
        return 0
    run_folder.claim(out, args.overwrite, args.resume)
    for job in jobs:
        job.folder.mkdir(parents=True, exist_ok=True)
        run_folder.write_config(config, job.folder)
    if launch.executor == "docker":
        return elsewhere.run(jobs, config, launch, out / "launcher")
    try:
        submitted = slurm.submit(jobs, launch)
    except UserError:
        _release(args)
        raise
    for one in submitted:
        print(f"slurm job {one.number}: {one.job.command}; scancel {one.number} ends it")
    print(f"run folder: {out}\nlogs: {submitted[-1].logs}", flush=True)
    if not launch.wait:
        return 0
    from megatron_precision.launch import slurm_watch

    return slurm_watch.wait(submitted)


def _release(args: argparse.Namespace) -> None:
    """Remove the folder of a run that did not begin, so that the next attempt can claim it."""
    if not args.resume:
        shutil.rmtree(args.out)


def _jobs(args: argparse.Namespace, config: RunConfig, out: Path) -> list[Job]:
    """Return the jobs to run, in order: a warm start that is not in the cache comes first."""
    from megatron_precision.data import start

    jobs = [train_job(config, out, _extra(args))]
    if args.start_from is None and config.start.kind == "warm_start":
        path = start.start_dir(config)
        if not start.start_is_complete(path):
            jobs.insert(0, prepare_job(config, path))
    return jobs


def _extra(args: argparse.Namespace) -> tuple[str, ...]:
    words = ["--start-from", str(args.start_from)] if args.start_from else []
    return (*words, "--resume") if args.resume else tuple(words)


def _print_dry_run(args: argparse.Namespace, config: RunConfig, launch: Options) -> None:
    if launch.executor == "local":
        print_plan(config, plan(config, args))
        return
    jobs = _jobs(args, config, args.out or NO_FOLDER)
    if launch.executor == "slurm":
        texts, lines = slurm.render(jobs, launch)
    else:
        texts, lines = elsewhere.render(jobs, config, launch)
    print(json.dumps(to_dict(config), indent=2))
    for job, text in zip(jobs, texts, strict=True):
        print(f"\nwould submit ({job.command}):\n{text}")
    print("\nevery node would run:")
    for line in lines:
        print(f"  {line}")


class _Parser(argparse.ArgumentParser):
    """A parser that raises `UserError` and does not accept abbreviated options."""

    def __init__(self, **words: Any) -> None:
        super().__init__(allow_abbrev=False, **words)
        self.register("type", int, _whole_number)

    def error(self, message: str) -> NoReturn:
        remedy = "--help lists the options"
        if "--srun-arg" in message:
            remedy = "write it as one word: --srun-arg=--mpi=pmix"
        raise UserError(Problem(message, "the command line", "", "", remedy))


@dataclass(frozen=True)
class _NotANumber:
    text: str


def _whole_number(text: str) -> int | _NotANumber:
    # Reported later, with the other mistakes: argparse would stop at the first one.
    return int(text) if text.strip().lstrip("+-").isdecimal() else _NotANumber(text)


def parse(argv: Sequence[str]) -> tuple[argparse.Namespace, list[Problem]]:
    """Parse the command line of `launch.py`.

    Returns:
        The arguments; a problem for every unknown option and every number that is not one.
    """
    parser = _Parser(description="Launch a recipe through nemo-run, here or on a cluster.")
    parser.add_argument("--list", action="store_true", help="list the recipes and stop")
    arguments.add_recipe_arguments(parser)
    arguments.add_folder_arguments(parser)
    options.add_arguments(parser)
    parser.add_argument(
        "words", nargs="*", metavar="PATH=VALUE", help="typed overrides, as after --set"
    )
    args, unknown = parser.parse_known_intermixed_args(argv)
    if args.recipe is not None and "=" in args.recipe:  # an override: --config FILE PATH=VALUE
        args.words.insert(0, args.recipe)
        args.recipe = None
    # A word after an unknown option is its value, or an override.
    args.overrides += [*args.words, *(w for w in unknown if "=" in w and w[0] != "-")]
    valid = [word for action in parser._actions for word in action.option_strings]
    problems = [_unknown_option(word, valid) for word in unknown if word[0] == "-"]
    for name, value in vars(args).items():
        if isinstance(value, _NotANumber):
            flag = "--" + name.replace("_", "-")
            problems.append(Problem(f"wrong value for {flag}", flag, value.text, "a whole number"))
            setattr(args, name, None)
    return args, problems


def _unknown_option(word: str, valid: Sequence[str]) -> Problem:
    name = word.partition("=")[0]
    close = nearest(name, valid)
    remedy = f"did you mean {' or '.join(close)}?" if close else "--help lists the options"
    return Problem("unknown option", "the command line", word, "an option of launch.py", remedy)
