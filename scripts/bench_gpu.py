"""Measure one GPU, FP16 beside BF16, in order of priority; each result is written as it is done.

    python scripts/bench_gpu.py --out docs/benchmarks/raw/gpu
    python scripts/bench_gpu.py --out docs/benchmarks/raw/gpu --tables             # what it found
    .venv/bin/python scripts/bench_gpu.py --out /tmp/gpu --platform cpu --tiny     # the code alone

Every measure is a process of its own: memory is fresh, and one that fails leaves its message in
its file and the others alone. An experiment is several commands. What has a result is not done
again, so that a run that was cut short goes on. `--budget-s` ends what is under way after so many
seconds, and starts nothing else. What libraries say is in a log beside the result.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from megatron_precision.gpu_bench import tables  # noqa: E402
from megatron_precision.gpu_bench.cases import CASES, Case, config, needs_gpu  # noqa: E402
from megatron_precision.gpu_bench.experiments import (  # noqa: E402
    WORK,
    Experiment,
    agenda,
    read_result,
)
from megatron_precision.platform.choice import VARIABLE, choose  # noqa: E402

CASE_LIMIT_S = 900.0
GRACE_S = 60.0  # after SIGTERM: a run saves a checkpoint


def main() -> int:
    """Everything that is asked for; 1 where something failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the raw results")
    parser.add_argument("--platform", choices=("cpu", "cuda"), help="default: the engine's")
    parser.add_argument("--tiny", action="store_true", help="models of a million weights")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="names, or beginnings")
    parser.add_argument("--budget-s", type=float, default=float("inf"))
    parser.add_argument("--list", action="store_true", help="names, in order; nothing is run")
    parser.add_argument("--tables", action="store_true", help="print what was found, and stop")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.platform:
        os.environ[VARIABLE] = args.platform
    if args.measure:
        measure(next(case for case in CASES if case.name == args.measure), args.out, args.tiny)
        return 0
    chosen = [
        item
        for item in agenda(args.tiny)
        if not args.only or item.name.startswith(tuple(args.only))
    ]
    if args.list:
        print("\n".join(item.name for item in chosen))
        return 0
    if args.tables:
        print(tables.text(args.out))
        return 0
    args.out = args.out.resolve()  # every process begins in the repository
    args.out.mkdir(parents=True, exist_ok=True)
    return 1 if run_all(chosen, args.out, args.tiny, args.budget_s) else 0


def run_all(chosen: Sequence[Case | Experiment], out: Path, tiny: bool, budget_s: float) -> int:
    """One after the other; how many failed."""
    begin, failed = time.monotonic(), 0
    for item in chosen:
        gpu_only = item.gpu_only if isinstance(item, Experiment) else needs_gpu(item)
        if choose().name == "cpu" and gpu_only:
            say(item, "left out: only a GPU can do it")
            continue
        path = out / f"{item.name}.json"
        if has_result(path):
            say(item, "there already")
            continue
        left_s = budget_s - (time.monotonic() - begin)
        if left_s <= 0:
            say(item, "not begun: the budget is spent")
            continue
        began = time.monotonic()
        try:
            if isinstance(item, Experiment):
                experiment(item, out, min(left_s, item.limit_s))
            else:
                case(item, out, tiny, min(left_s, CASE_LIMIT_S))
        except Failed as why:
            failed += 1
            took = time.monotonic() - began
            kept = json.loads(path.read_text()) if path.is_file() else {"case": item.name}
            write(path, {**kept, "error": f"{why} after {took:.0f} s"})
            say(item, f"FAILED, see {path.with_suffix('.log')}: {why}")
            continue
        found = json.loads(path.read_text())
        # Tests that fail are a result, and no success.
        failed += bool(found.get("failed"))
        say(item, f"{time.monotonic() - began:6.0f} s{outcome(found)}")
    return failed


class Failed(Exception):
    """Something ended without a result."""


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


def has_result(path: Path) -> bool:
    """Whether a measure has come to its end."""
    return path.is_file() and not {"error", "left_out"} & json.loads(path.read_text()).keys()


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def case(item: Case, out: Path, tiny: bool, limit_s: float) -> None:
    """One measure in a process of its own.

    Raises:
        Failed: where it left no result.
    """
    command = [sys.executable, __file__, "--out", str(out), "--measure", item.name]
    environment = {
        **os.environ,
        "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "VLLM_LOGGING_LEVEL": "INFO",  # which kernels it takes
    }  # fmt: skip
    path, log = out / f"{item.name}.json", out / f"{item.name}.log"
    path.unlink(missing_ok=True)  # what an earlier attempt said
    with log.open("wb") as file:
        code = bounded([*command, *(["--tiny"] if tiny else [])], environment, file, limit_s)
    if not path.is_file() or "error" in json.loads(path.read_text()):
        raise Failed(f"exit code {code}, {last_line(log)}")
    if code:  # libraries may yet fail as they leave the GPU; the numbers are there
        say(item, f"exit code {code} behind its result, see {log}")


def experiment(item: Experiment, out: Path, limit_s: float) -> None:
    """The commands of an experiment that have not ended yet, and its result.

    Raises:
        Failed: where a command failed, or left no result.
    """
    work = out / "work" / item.name
    work.mkdir(parents=True, exist_ok=True)
    commands = [[word.replace(WORK, str(work)) for word in words] for words in item.commands]
    begin, log = time.monotonic(), out / f"{item.name}.log"
    with log.open("ab") as file:
        for number, words in enumerate(commands):
            done = work / f"command-{number}.json"
            if done.is_file():
                continue
            began = time.monotonic()
            left_s = limit_s - (began - begin)
            code = bounded([sys.executable, *words], dict(os.environ), file, left_s)
            if code and not (item.tolerates_failure and (work / item.result).is_file()):
                raise Failed(f"command {number + 1} of {len(commands)}, exit code {code}")
            write(done, {"seconds": time.monotonic() - began})
    facts = {
        "experiment": item.name,
        "commands": [shlex.join(words) for words in item.commands],  # no path of this machine
        "seconds": [
            json.loads((work / f"command-{number}.json").read_text())["seconds"]
            for number in range(len(commands))
        ],
        **read_result(work / item.result),
    }
    for source, ending in item.kept:
        shutil.copyfile(work / source, out / f"{item.name}{ending}")
    write(out / f"{item.name}.json", facts)


def bounded(
    command: Sequence[str], environment: dict[str, str], log: IO[bytes], limit_s: float
) -> int:
    """Exit code of a command; at its limit it is asked to end, and then made to."""
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
    )
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(max(0.0, limit_s))
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        return process.wait(GRACE_S) or 1
    process.kill()
    return process.wait()


def measure(item: Case, out: Path, tiny: bool) -> None:
    """In the measure's own process: run it and write its result."""
    run_config = config(item, tiny=tiny, gpu=choose().name == "cuda")
    from megatron_precision.platform import startup

    startup.start(run_config.seed)
    from megatron_precision.config import to_dict
    from megatron_precision.gpu_bench.measures import MEASURES, too_large

    facts = {
        "case": item.name,
        "command": f"scripts/bench_gpu.py --only {item.name}{' --tiny' * tiny}",
        "platform": startup.describe(),
        "versions": startup.versions(),
        "config": to_dict(run_config),
    }
    path = out / f"{item.name}.json"

    def keep(found: dict[str, Any]) -> None:
        # What comes after may crash, or not be waited for.
        write(path, {**facts, **found, "error": "it did not come to its end"})

    if why := too_large(item, run_config):
        found: dict[str, Any] = {"left_out": why}
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = MEASURES[item.kind](run_config, Path(folder), keep)
    write(path, {**facts, **found})


def write(path: Path, facts: dict[str, Any]) -> None:
    """A result, whole or not at all."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


if __name__ == "__main__":
    sys.exit(main())
