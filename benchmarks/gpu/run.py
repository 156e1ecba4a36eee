"""Measure one GPU, FP16 beside BF16, in order of priority; each result is written as it is done.

    python benchmarks/gpu/run.py --out docs/benchmarks/raw/gpu
    python benchmarks/gpu/run.py --out docs/benchmarks/raw/gpu --tables             # what it found
    .venv/bin/python benchmarks/gpu/run.py --out /tmp/gpu --platform cpu --tiny     # the code alone

Every measure is a process of its own: memory is fresh, and one that fails leaves its message in
its file and the others alone. An experiment is several commands. What has a result is not done
again, so that a run that was cut short goes on; what was never begun comes before what failed.
`--budget-s` ends what is under way after so many seconds, and starts nothing else. With `--ahead`
a measure imports while the one before it measures, and touches the GPU when that has ended: for
short leases, since it may disturb what is timed. What libraries say is in a log beside the result.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import tables  # noqa: E402
from benchmarks.gpu.cases import CASES, Case, config, needed_bytes, needs_gpu, other_trainers  # noqa: E402
from benchmarks.gpu.experiments import (  # noqa: E402
    Experiment,
    Failed,
    agenda,
    experiment,
    last_line,
    recorded,
    wait_for,
    write,
)
from megatron_precision.checks.packages import DRIVER  # noqa: E402
from megatron_precision.config.errors import Problem, UserError, unknown_name  # noqa: E402
from megatron_precision.launch.local import exclusive  # noqa: E402
from megatron_precision.platform.choice import VARIABLE, choose  # noqa: E402
from megatron_precision.platform.process import JOB_VARIABLE, new_job_id  # noqa: E402
from megatron_precision.preflight.memory import RESERVE_BYTES  # noqa: E402

CASE_LIMIT_S = 900.0
GO = b"go\n"  # to a measure that waits
ENGINES = ("megatron.core", "transformer_engine.pytorch", "vllm.v1.worker.gpu_model_runner")


def main() -> int:
    """Everything that is asked for; 1 where something failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the raw results")
    parser.add_argument("--platform", choices=("cpu", "cuda"), help="default: the engine's")
    parser.add_argument("--tiny", action="store_true", help="models of a million weights")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names, or beginnings of some")
    parser.add_argument("--budget-s", type=float, default=float("inf"))
    parser.add_argument("--ahead", action="store_true", help="the next measure imports meanwhile")
    parser.add_argument(
        "--list", action="store_true", help="names and GB, in order; nothing is run"
    )
    parser.add_argument("--tables", action="store_true", help="print what was found, and stop")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.platform:
        os.environ[VARIABLE] = args.platform
    if args.measure:
        measure(next(case for case in CASES if case.name == args.measure), args.out, args.tiny)
        return 0
    try:
        if args.tables:
            if not args.out.is_dir():
                raise UserError(Problem("no results", "--out", args.out, "a folder of results"))
            print(tables.text(args.out))
            return 0
        chosen = choice(args)
        if args.list:
            print("\n".join(map(line_of, chosen)))
            return 0
        out = args.out.resolve()  # every process begins in the repository
        signal.signal(signal.SIGTERM, end)
        with exclusive(out / "work" / "lock"):
            return 1 if run_all(chosen, out, args.tiny, args.budget_s, args.ahead) else 0
    except UserError as wrong:
        print(wrong, file=sys.stderr)
        return 2


def line_of(item: Case | Experiment) -> str:
    """A measure's name, and for a model of size what it needs of a GPU."""
    if isinstance(item, Experiment):
        return f"{item.name:48}at most {item.limit_s / 60:.0f} min"
    needed = needed_bytes(item, config(item, tiny=False, gpu=True)) + RESERVE_BYTES
    return f"{item.name:48}{needed / 1e9:.0f} GB"


def choice(args: argparse.Namespace) -> list[Case | Experiment]:
    """What is asked for, as it is named, or everything in order of priority.

    Raises:
        UserError: for a name that nothing begins with, large models on a CPU, and CUDA without
            a driver.
    """
    everything = agenda(args.tiny)
    names = [item.name for item in everything]
    wrong = [
        unknown_name("measure", "--only", word, names)
        for word in args.only or ()
        if not any(name.startswith(word) for name in names)
    ]
    if choose().name == "cpu" and not (args.tiny or args.list):
        wrong.append(
            Problem(
                "models of billions of weights on a CPU",
                "the platform",
                choose().reason,
                "CUDA",
                "a GPU host's interpreter (docs/gpu.md; make gpu GPU_PYTHON=...), or --tiny",
            )
        )
    if choose().name == "cuda" and not DRIVER.exists() and not args.list:
        wrong.append(
            Problem(
                "no GPU here to measure",
                "the platform",
                f"cuda: {choose().reason}; {DRIVER} is not there",
                "NVIDIA's driver",
                "a host with a GPU (docs/gpu.md)",
            )
        )
    if wrong:
        raise UserError(wrong)
    if not args.only:
        return list(everything)
    # As named, and each once; a whole name is that measure alone.
    found = [
        item
        for word in args.only
        for item in everything
        if item.name == word or (word not in names and item.name.startswith(word))
    ]
    return list(dict.fromkeys(found))


def end(_signal: int, _frame: object) -> NoReturn:
    """SIGTERM: an exception, so that what is under way is ended too."""
    sys.exit(143)


def run_all(
    chosen: Sequence[Case | Experiment],
    out: Path,
    tiny: bool,
    budget_s: float,
    ahead: bool = False,
) -> int:
    """One after the other; how many failed."""
    begin, failed = time.monotonic(), 0
    todo = []
    for item in sorted(chosen, key=lambda item: standing(recorded(out / f"{item.name}.json"))):
        gpu_only = item.gpu_only if isinstance(item, Experiment) else needs_gpu(item)
        found = recorded(out / f"{item.name}.json")
        if choose().name == "cpu" and gpu_only:
            say(item, "left out: only a GPU can do it")
        elif found and not standing(found):
            failed += bool(found.get("failed"))
            say(item, f"there already{outcome(found)}")
        else:
            todo.append(item)
    with contextlib.closing(Measuring(out, tiny)) as measuring:
        for item, later in itertools.zip_longest(todo, todo[1:]):
            left_s = budget_s - (time.monotonic() - begin)
            if left_s <= 0:
                say(item, "not begun: the budget is spent")
                continue
            began = time.monotonic()
            path = out / f"{item.name}.json"
            try:
                if isinstance(item, Experiment):
                    experiment(item, out, min(left_s, item.limit_s))
                else:
                    measuring.run(item, later if ahead else None, min(left_s, CASE_LIMIT_S))
            except Failed as why:
                failed += 1
                took = time.monotonic() - began
                write(
                    path,
                    {"case": item.name, **recorded(path), "error": f"{why} after {took:.0f} s"},
                )
                say(item, f"FAILED, see {path.with_suffix('.log')}: {why}")
                continue
            found = recorded(path)
            # Tests that fail are a result, and no success.
            failed += bool(found.get("failed"))
            say(item, f"{time.monotonic() - began:6.0f} s{outcome(found)}")
    return failed


def standing(found: dict[str, Any]) -> int:
    """0 for what was never begun or has a result, 1 for what failed, 2 for what did not fit: a
    measure that fails takes no budget from those behind it twice."""
    return 1 if "error" in found else 2 if "left_out" in found else 0


def say(item: Case | Experiment, what: str) -> None:
    print(f"{item.name:48}{what}", flush=True)


def outcome(found: dict[str, Any]) -> str:
    """What there is to say of a result in a line."""
    if "left_out" in found:
        return f"  left out: {found['left_out']}"
    if "passed" in found:
        return f"  {found['passed']} tests passed, {found['failed']} failed"
    return ""


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Measuring:
    """Processes of measures: one that measures, and perhaps one that has imported and waits.

    Args:
        out: where results and logs are.
        tiny: whether with models of a million weights.
    """

    def __init__(self, out: Path, tiny: bool) -> None:
        self.out, self.tiny = out, tiny
        self._ahead: tuple[str, subprocess.Popen[bytes]] | None = None

    def run(self, item: Case, later: Case | Experiment | None, limit_s: float) -> None:
        """A measure to its end, in a process of its own; meanwhile what is `later` imports.

        Raises:
            Failed: where it left no result.
        """
        path, log = self.out / f"{item.name}.json", self.out / f"{item.name}.log"
        if self._ahead is None or self._ahead[0] != item.name:
            self.close()
            self._ahead = item.name, self._begin(item)
        process, self._ahead = self._ahead[1], None
        before = path.with_suffix(".before")  # what an earlier attempt found, whole or not
        if path.is_file():
            path.replace(before)
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has failed already; its log says why
            process.stdin.write(GO)
            process.stdin.close()
        if isinstance(later, Case):
            self._ahead = later.name, self._begin(later)
        code = wait_for(process, limit_s)
        if before.is_file():
            before.unlink() if path.is_file() else before.replace(path)
        found = recorded(path)
        if not found or "error" in found:
            raise Failed(f"exit code {code}, {last_line(log)}")
        if code:  # libraries may yet fail as they leave the GPU; the numbers are there
            say(item, f"exit code {code} behind its result, see {log}")

    def close(self) -> None:
        """End the process that waits, if there is one."""
        if self._ahead is not None:
            self._ahead[1].kill()
            self._ahead[1].wait()
            self._ahead = None

    def command(self, item: Case) -> list[str]:
        """What measures in a process of its own, when it has read `GO`."""
        words = [sys.executable, __file__, "--out", str(self.out), "--measure", item.name]
        return [*words, *(["--tiny"] if self.tiny else [])]

    def _begin(self, item: Case) -> subprocess.Popen[bytes]:
        environment = {
            **os.environ,
            "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "VLLM_LOGGING_LEVEL": "INFO",  # which kernels it takes
            # It imports the engines first: none of them is to start CUDA, and this is read by then.
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1",
            # Named after its parent it would be the same job as the one beside it.
            JOB_VARIABLE: new_job_id(),
        }  # fmt: skip
        with (self.out / f"{item.name}.log").open("ab") as log:
            return subprocess.Popen(
                self.command(item),
                env=environment,
                cwd=ROOT,
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
            )


def measure(item: Case, out: Path, tiny: bool) -> None:
    """In the measure's own process: run it and write its result."""
    gpu = choose().name == "cuda"
    run_config = config(item, tiny=tiny, gpu=gpu)
    if gpu:  # the CPU's patches want to be there first
        import_engines()
    if sys.stdin.buffer.readline() != GO:
        raise SystemExit("nobody waits for this measure any more")
    os.environ["MASTER_PORT"] = str(free_port())  # not before: the one ahead may have taken it
    from megatron_precision.platform import startup

    startup.start(run_config.seed)
    from benchmarks.gpu.measures import MEASURES, too_large
    from megatron_precision.config.schema import to_dict

    facts = {
        "case": item.name,
        "command": f"benchmarks/gpu/run.py --only {item.name}{' --tiny' * tiny}",
        "platform": startup.describe(),
        "versions": startup.versions(),
        "commit": commit(),
        "config": to_dict(run_config),
    }
    path = out / f"{item.name}.json"

    def keep(found: dict[str, Any]) -> None:
        # What comes after may crash, or not be waited for.
        write(path, {**facts, **found, "error": "it did not come to its end"})

    if why := too_large(item, run_config):
        found: dict[str, Any] = {"left_out": why}
    else:
        folder = out / "work" / item.name  # gigabytes; a killed measure's are in its own way alone
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        others = {
            name: config(other, tiny=tiny, gpu=gpu)
            for name, other in other_trainers(item).items()
            if gpu or not needs_gpu(other)
        }
        found = MEASURES[item.kind](run_config, folder, keep, others)
        shutil.rmtree(folder)
    write(path, {**facts, **found})


def commit() -> str:
    """Of the checkout, and whether it was changed since; empty where git does not know."""
    words = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    done = subprocess.run(words, capture_output=True, text=True)
    return done.stdout.strip()


def import_engines() -> None:
    """What takes seconds and no GPU."""
    from megatron_precision.rollout import vllm_versions

    vllm_versions.set_environment()
    for name in ENGINES:
        importlib.import_module(name)


if __name__ == "__main__":
    sys.exit(main())
