"""Defines, checks and resolves the options of `launch.py` that say where and how a job runs.

The options have the names that NVIDIA's launch scripts use. An option takes precedence over the
environment (`SLURM_ACCOUNT`, `SLURM_PARTITION`, `CONTAINER_IMAGE`), and the environment over the
site's file. All mistakes are reported together, before nemo-run is imported and before anything is
submitted.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_precision.config.errors import Problem, unknown_name
from megatron_precision.config.schema import RunConfig
from megatron_precision.launch.mounts import Mount, parse
from megatron_precision.launch.site import Site, read, usual_path

EXECUTORS = ("local", "slurm", "docker", "kubeflow", "skypilot")
DEFAULT_TIME = "04:00:00"
# The executors that take an option; an option that is not listed works with all of them.
_TAKEN_BY = {
    "account": ("slurm",),
    "partition": ("slurm",),
    "time": ("slurm",),
    "srun_args": ("slurm",),
    "restarts": ("slurm",),
    "array": ("slurm",),
    "container_image": ("slurm", "docker", "kubeflow", "skypilot"),
    "mounts": ("slurm", "docker"),
    "env": ("slurm", "kubeflow"),
    "retries": ("slurm", "docker", "kubeflow"),
    "detach": ("slurm", "skypilot"),
    "nodes": ("slurm", "kubeflow", "skypilot"),
}
_VARIABLES = {
    "account": "SLURM_ACCOUNT",
    "partition": "SLURM_PARTITION",
    "container_image": "CONTAINER_IMAGE",
}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_WORD = re.compile(r"[\w.,@+-]+")
_IMAGE = re.compile(r"[\w.@:/+#%=~-]+")
_TITLE = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass(frozen=True)
class Options:
    """The resolved options of a launch.

    Attributes:
        nodes: number of machines.
        gpus_per_node: ranks on each machine; one rank has one GPU, if there are GPUs.
        time: the queue's time limit for one start of the job, in Slurm's notation.
        time_s: the same limit in seconds.
        env: names of the variables that the job takes from the user's environment.
        retries: how often a job that failed is started again.
        restarts: how often a job that was stopped, by its time limit or by pre-emption, resumes
            from its last checkpoint.
        array: the number of tasks, if the job is submitted as a job array; otherwise 0.
        wait: whether `launch.py` waits until the job ends.
    """

    executor: str
    nodes: int
    gpus_per_node: int
    account: str | None
    partition: str | None
    time: str
    time_s: int
    container_image: str | None
    mounts: tuple[Mount, ...]
    env: tuple[str, ...]
    srun_args: tuple[str, ...]
    retries: int
    restarts: int
    array: int
    experiment_name: str
    wait: bool
    site: Site


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of a launch to a parser, all as text: `resolve` checks them."""
    where = parser.add_argument_group("where it runs")
    add = where.add_argument
    add("--executor", metavar="E", default="local", help=f"{', '.join(EXECUTORS)}; default: local")
    add("--nodes", metavar="N", help="number of machines; default: as many as the layout needs")
    add("--gpus-per-node", metavar="G", help="ranks on each machine; default: at most 8")
    add("--account", metavar="A", help="Slurm account; default: SLURM_ACCOUNT")
    add("--partition", metavar="P", help="Slurm partition; default: SLURM_PARTITION")
    add("--time", metavar="T", help=f"limit for one start, D-HH:MM:SS; default: {DEFAULT_TIME}")
    add("--container-image", metavar="IMAGE", help="default: CONTAINER_IMAGE, or no container")
    add("--mount", dest="mounts", action="append", metavar="HOST[:CTR]", help="may be repeated")
    add(
        "--env",
        action="append",
        metavar="NAME",
        help="pass this variable to the job; its value is not written to a file; may be repeated",
    )
    add("--srun-arg", dest="srun_args", action="append", metavar="ARG", help="--srun-arg=--mpi=x")
    add("--retries", metavar="N", help="start a job that failed again, N times at most")
    add(
        "--restarts",
        metavar="N",
        help="resume from the last checkpoint after the time limit or pre-emption, at most N times",
    )
    add(
        "--array",
        metavar="N",
        help="resume as --restarts does, with N array tasks instead of queueing the job again",
    )
    add("--experiment-name", metavar="NAME", help="default: the recipe")
    add("--wait", action="store_true", help="wait for the job and exit with its code (default)")
    add("--detach", action="store_true", help="submit, print the job's number, and return")
    add("--site", metavar="FILE", help=f"file with a site's defaults; default: {usual_path()}")


def resolve(
    args: argparse.Namespace, config: RunConfig | None
) -> tuple[Options | None, list[Problem]]:
    """Resolve the options of a launch and check them.

    Args:
        args: the parsed options of `add_arguments`, and `dryrun`.
        config: the configuration of the run; None if it has problems itself.

    Returns:
        The options, or None if there are problems; the problems.
    """
    site, problems = read(args.site)
    if args.executor not in EXECUTORS:
        problems.append(unknown_name("executor", "--executor", args.executor, EXECUTORS))
    else:
        problems += _of_another_executor(args)
    said = _Said(args, site)
    options = Options(
        executor=args.executor,
        nodes=said.count("nodes", 1, default=0),
        gpus_per_node=said.count("gpus_per_node", 1, default=0),
        account=said.matching("account", _WORD, "a name of letters, digits and . _ @ + -"),
        partition=said.matching("partition", _WORD, "a name, or several with commas between"),
        time=str(said.value("time") or DEFAULT_TIME),
        time_s=said.seconds(),
        container_image=said.matching("container_image", _IMAGE, "an image without spaces"),
        mounts=said.mounts(),
        env=said.names(must_be_set=args.executor == "slurm" and not args.dryrun),
        srun_args=said.srun_args(),
        retries=said.count("retries", 0, default=0),
        restarts=said.count("restarts", 0, default=0),
        array=said.count("array", 0, default=0),
        experiment_name=said.title(config),
        wait=not args.detach,
        site=site,
    )
    problems += said.problems
    if args.wait and args.detach:
        problems.append(Problem("waiting and not waiting", "--wait --detach", "both", "one"))
    options, found = _one_way_on(options, args, said)
    problems += found
    problems += _container_problems(options, args)
    if config is not None and not any(p.where in _SIZES for p in problems):
        options = _sized(options, config)
        problems += _size_problems(options, config)
    return (None, problems) if problems else (options, [])


_SIZES = ("--nodes", "--gpus-per-node")


def _flag(name: str) -> str:
    special = {"mounts": "--mount", "srun_args": "--srun-arg"}
    return special.get(name, "--" + name.replace("_", "-"))


def _of_another_executor(args: argparse.Namespace) -> Iterator[Problem]:
    for name, takers in _TAKEN_BY.items():
        value = getattr(args, name)
        harmless = name == "nodes" and value == "1"
        if value and args.executor not in takers and not harmless:
            yield Problem(
                what=f"{_flag(name)} does not belong to this executor",
                where=_flag(name),
                got=f"--executor {args.executor}",
                expected=f"--executor {' or '.join(takers)}",
                remedy=_INSTEAD.get((name, args.executor), ""),
            )


_INSTEAD = {
    ("env", "local"): "a local job has the environment of launch.py",
    ("env", "docker"): "nemo-run would write the value down; --mount a file such as ~/.netrc",
    ("env", "skypilot"): "nemo-run would write the value down; use SkyPilot's own secrets",
    ("mounts", "kubeflow"): "the site's file names the volume: kubeflow.workdir_pvc",
    ("nodes", "local"): "on several machines: --executor slurm, or torchrun by hand",
}


class _Said:
    """Reads each option from the arguments, the environment or the site's file.

    It remembers where a value comes from, for error messages, and collects the problems.
    """

    def __init__(self, args: argparse.Namespace, site: Site) -> None:
        self.problems: list[Problem] = []
        self._args = args
        self._site = site
        self._where: dict[str, str] = {}

    def value(self, name: str) -> Any:
        """Return the value of an option; None if it is not set anywhere."""
        takers = _TAKEN_BY.get(name, EXECUTORS)
        said = getattr(self._args, name)
        variable = _VARIABLES.get(name, "")
        self._where[name] = _flag(name)
        if said is None and self._args.executor in takers:
            said = os.environ.get(variable) or None
            self._where[name] = variable
            if said is None:
                said = self._site.defaults.get(name)
                self._where[name] = f"{self._site.path}: {name}"
        return said

    def where(self, name: str) -> str:
        """Return where the value of an option came from, after `value` has read it."""
        return self._where[name]

    def count(self, name: str, least: int, default: int) -> int:
        value = self.value(name)
        if value is None:
            return default
        if not re.fullmatch(r"\d{1,6}", str(value)) or int(value) < least:
            self._wrong(name, value, f"a whole number, {least} or more")
            return default
        return int(value)

    def matching(self, name: str, pattern: re.Pattern[str], expected: str) -> str | None:
        value = self.value(name)
        if value is not None and not pattern.fullmatch(value):
            self._wrong(name, value, expected)
            return None
        return None if value is None else str(value)

    def seconds(self) -> int:
        value = str(self.value("time") or DEFAULT_TIME)
        found = _TIME.fullmatch(value)
        if not found:
            self._wrong("time", value, "MINUTES, HH:MM:SS or D-HH:MM:SS")
            return 0
        days, *parts = (int(part) if part else None for part in found.groups())
        numbers = [part for part in parts if part is not None]
        # Slurm's notation: D-HH[:MM[:SS]], HH:MM:SS, MM:SS or MM.
        units = (3600, 60, 1) if days is not None or len(numbers) == 3 else (60, 1)
        total = (days or 0) * 86400 + sum(n * u for n, u in zip(numbers, units, strict=False))
        if total < 60:
            self._wrong("time", value, "a minute or more")
        return total

    def several(self, name: str) -> list[tuple[str, str]]:
        """Return the entries of a list, the site's first, each with where it came from."""
        found: list[tuple[str, str]] = []
        if self._args.executor in _TAKEN_BY.get(name, EXECUTORS):
            site = self._site.defaults.get(name, ())
            found = [(text, f"{self._site.path}: {name}") for text in site]
        return found + [(text, f"{_flag(name)} {text}") for text in getattr(self._args, name) or ()]

    def mounts(self) -> tuple[Mount, ...]:
        found = []
        for text, where in self.several("mounts"):
            mount, problems = parse(text, where)
            self.problems += problems
            found += [mount] if mount else []
        return tuple(found)

    def names(self, must_be_set: bool) -> tuple[str, ...]:
        found = []
        for text, where in self.several("env"):
            name, equals, _ = text.partition("=")
            by_option = where.startswith("--")
            self._where["env"] = "--env" if by_option else where  # without a value
            if equals or not _NAME.fullmatch(name):
                # The value may be a secret, so the message does not show it.
                shown = f"{name}=..." if equals else repr(name)
                self._wrong("env", shown, "the name of a variable alone; its value stays outside")
            elif must_be_set and by_option and name not in os.environ:
                self._wrong("env", f"{name}, which is not set", "a variable of this environment")
            else:
                found.append(name)
        return tuple(dict.fromkeys(found))

    def srun_args(self) -> tuple[str, ...]:
        said = self.several("srun_args")
        for text, where in said:
            if not re.match(r"--?\w", text):
                self._where["srun_args"] = where
                self._wrong("srun_args", text, "an option of srun in one word, such as --mpi=pmix")
        return tuple(text for text, _ in said)

    def title(self, config: RunConfig | None) -> str:
        said = self._args.experiment_name
        if said is not None and not _TITLE.fullmatch(said):
            self._where["experiment_name"] = "--experiment-name"
            self._wrong("experiment_name", said, "letters, digits, - and _")
        return said or ("" if config is None else config.recipe.replace(".", "-"))

    def _wrong(self, name: str, value: object, expected: str) -> None:
        self.problems.append(
            Problem(f"wrong value for {_flag(name)}", self._where[name], str(value), expected)
        )


def _one_way_on(
    options: Options, args: argparse.Namespace, said: _Said
) -> tuple[Options, list[Problem]]:
    """Choose between restarts and an array: an option takes precedence over the site's file."""
    if not (options.array and options.restarts):
        return options, []
    if args.array is None and args.restarts is not None:
        return dataclasses.replace(options, array=0), []
    if args.restarts is None and args.array is not None:
        return dataclasses.replace(options, restarts=0), []
    return options, [
        Problem(
            "two ways to go on after a time limit",
            f"{said.where('array')}, {said.where('restarts')}",
            f"{options.array} and {options.restarts}",
            "--restarts, or --array if the cluster does not queue jobs again",
        )
    ]


def _container_problems(options: Options, args: argparse.Namespace) -> Iterator[Problem]:
    if options.executor in ("docker", "kubeflow") and not options.container_image:
        yield Problem(
            f"--executor {options.executor} runs in a container", "--container-image", "nothing",
            "an image",
        )  # fmt: skip
    if args.mounts and options.executor == "slurm" and not options.container_image:
        yield Problem("mounts without a container", "--mount", "no --container-image", "an image")


def _sized(options: Options, config: RunConfig) -> Options:
    """Set the number of nodes and of ranks on each to what the layout needs, if they are open."""
    world = config.parallel.world_size
    per_node = options.gpus_per_node
    if not per_node:
        most = 8 if options.executor in _TAKEN_BY["nodes"] else world
        per_node = world // options.nodes if options.nodes else min(most, world)
    nodes = options.nodes or max(1, world // max(1, per_node))
    return dataclasses.replace(options, nodes=nodes, gpus_per_node=per_node)


def _size_problems(options: Options, config: RunConfig) -> Iterator[Problem]:
    world, engine = config.parallel.world_size, config.parallel.rollout_tp_size
    nodes, per_node = options.nodes, options.gpus_per_node
    takers = _TAKEN_BY["nodes"]
    if nodes > 1 and options.executor not in takers:
        yield Problem(
            "this executor has one machine", "--nodes", str(nodes),
            f"1, or --executor {' or '.join(takers)}",
        )  # fmt: skip
    if nodes * per_node != world:
        yield Problem(
            what="the job's number of GPUs is not the layout's number of ranks",
            where="--nodes x --gpus-per-node",
            got=f"{nodes} x {per_node} = {nodes * per_node}",
            expected=f"parallel.world_size, which is {world}",
            remedy="--gpus N chooses the layout of a large recipe, parallel.* changes any",
        )
    elif engine > per_node or per_node % engine:
        yield Problem(
            what="an engine would be divided over machines",
            where="parallel.rollout_tp_size",
            got=f"{engine} on machines of {per_node}",
            expected="a divisor of --gpus-per-node",
        )
