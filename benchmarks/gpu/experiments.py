"""Defines and runs the experiments: measures that are commands which a user has as well.

They are the tests, the matrix of dtypes on a real model, and the sanity experiment at the size of
one GPU. Each command is its own process. A command that has ended is not run again, and a long one
resumes where it was stopped. This module imports no torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any
from xml.etree import ElementTree

from benchmarks.gpu.cases import CASES, PRECISIONS, Case

ROOT = Path(__file__).resolve().parents[2]
WORK = "{work}"  # in a word: the experiment's own folder
GRACE_S = 60.0  # after SIGTERM; a run that launch.py watches has ten of them to save a checkpoint
# The measures that come first, in order of what a short lease should bring home.
FIRST = 4


@dataclass(frozen=True)
class Command:
    """Words after the interpreter.

    Attributes:
        product: a file of the work folder that is there once this has ended, although its process
            may not have lived to say so.
        ok: exit codes that are no failure.
    """

    words: tuple[str, ...]
    product: str = ""
    ok: tuple[int, ...] = (0,)


@dataclass(frozen=True)
class Experiment:
    """Commands one after the other, and the files that are their result.

    Attributes:
        name: that of its result, as of a measure.
        commands: in order.
        results: in the work folder; one JSON file, or pytest's XML files.
        kept: further files of the work folder, and the endings under which they lie beside the
            result.
        limit_s: of all commands together.
        gpu_only: whether the CPU has nothing of it.
    """

    name: str
    commands: tuple[Command, ...]
    results: tuple[str, ...]
    kept: tuple[tuple[str, str], ...] = ()
    limit_s: float = 900.0
    gpu_only: bool = False


def _tests_of(name: str) -> Command:
    words = ("-m", "pytest", "-m", "gpu and not slow", f"--junitxml={WORK}/{name}.xml")
    return Command((*words, f"tests/gpu/test_{name}.py"), ok=(0, 1))  # 1: a test failed


# A file each, so that a lease that ends loses no more than one.
TESTS_OF = ("kernels", "trainer", "engine", "resume_on_gpu")
TESTS = Experiment(
    name="tests",
    commands=tuple(map(_tests_of, TESTS_OF)),
    results=tuple(f"{name}.xml" for name in TESTS_OF),
    gpu_only=True,
)


def mismatch(tiny: bool) -> Experiment:
    """Figure 5 on SmolLM2-135M: every training dtype against every rollout dtype.

    Args:
        tiny: a few tokens in one dtype.
    """
    size = "--num-prompts 16 --rollouts 32 --max-tokens 512"
    if tiny:
        size = "--num-prompts 2 --rollouts 1 --max-tokens 4 --train fp16 --rollout fp16"
    words = f"-m megatron_precision mismatch --model smollm2 --ranks 1 --out {WORK}/matrix {size}"
    return Experiment(
        name="mismatch-smollm2",
        commands=(Command(tuple(words.split())),),
        results=("matrix/report.json",),
        kept=(("matrix/report.html", ".html"), ("matrix/figure5.png", ".png")),
        limit_s=3600,
    )


def sanity(tiny: bool) -> Experiment:
    """The sanity experiment on SmolLM2-135M: 300 iterations in each precision.

    Args:
        tiny: one iteration of two prompts.
    """
    sums = f"{WORK}/sums"
    few, short, all_of = "", "checkpoint.every=10", "0.05 0.95"
    if tiny:
        few, all_of = "--questions 2", "0 1"
        short = (
            "checkpoint.every=1 train.iterations=1 train.prompts_per_iteration=2 eval.every=0 "
            "train.rollouts_per_prompt=2 train.prompts_per_mini_batch=2 rollout.kv_cache_mib=256 "
            "rollout.max_response_tokens=8 eval.samples_per_question=1 "
            "perfectible.samples_per_question=2"
        )
    low, high = all_of.split()
    train = [
        f"launch.py sanity.smollm2 --precision {precision} --model {sums}/model --resume "
        f"--out {WORK}/{precision} --set task.train_sets=sums={WORK}/perfectible.jsonl "
        f"task.eval_sets=held_out={sums}/held_out.jsonl {short}"
        for precision in PRECISIONS
    ]
    perfectible = (
        f"-m megatron_precision perfectible sanity.smollm2 --model {sums}/model "
        f"--out {WORK}/perfectible.jsonl --set task.train_sets=sums={sums}/sums.jsonl "
        f"{short} perfectible.accuracy_low={low} perfectible.accuracy_high={high}"
    )
    report = f"-m megatron_precision report {WORK}/bf16 {WORK}/fp16 --out {WORK}/report.html"
    return Experiment(
        name="sanity-smollm2",
        commands=(
            Command(tuple(f"benchmarks/smollm2_sums.py {sums} {few}".split())),
            Command(tuple(perfectible.split()), product="perfectible.jsonl"),
            *(Command(tuple(line.split())) for line in train),
            Command(tuple(report.split())),
        ),
        results=("report.json",),
        kept=(
            ("report.html", ".html"),
            *((f"{precision}/metrics.jsonl", f"-{precision}.jsonl") for precision in PRECISIONS),
        ),
        limit_s=4 * 3600,
    )


def agenda(tiny: bool) -> tuple[Case | Experiment, ...]:
    """Everything, in order of priority.

    Args:
        tiny: of the experiments, what a CPU does in minutes.
    """
    return (*CASES[:FIRST], TESTS, *CASES[FIRST:], mismatch(tiny), sanity(tiny))


def read_results(paths: Sequence[Path]) -> dict[str, Any]:
    """The result of an experiment.

    Raises:
        OSError, ValueError, ElementTree.ParseError: for a file that is not there or not whole.
    """
    if paths[0].suffix == ".xml":
        return _tests(paths)
    (path,) = paths
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def _tests(paths: Sequence[Path]) -> dict[str, Any]:
    """Outcomes and seconds of each test, of pytest's XML; a file that could not be collected has
    failed."""
    tests, counts = [], {"passed": 0, "failed": 0, "skipped": 0}
    for case in (case for path in paths for case in ElementTree.parse(path).iter("testcase")):
        outcome, said = "passed", ""
        for tag, name in (("failure", "failed"), ("error", "failed"), ("skipped", "skipped")):
            if (found := case.find(tag)) is not None:
                outcome, said = name, found.get("message", "")
        counts[outcome] += 1
        tests.append(
            {
                "test": case.get("name"),
                "outcome": outcome,
                "seconds": float(case.get("time", 0)),
                **({"message": said} if said else {}),
            }
        )
    return {**counts, "seconds": sum(test["seconds"] for test in tests), "tests": tests}


class Failed(Exception):
    """A process ended without a result."""


def experiment(item: Experiment, out: Path, limit_s: float) -> None:
    """Run the commands of an experiment that have not ended yet, and write its result.

    Raises:
        Failed: if a command fails or leaves no result.
    """
    work = out / "work" / item.name
    work.mkdir(parents=True, exist_ok=True)
    begin, log = time.monotonic(), out / f"{item.name}.log"
    ended = [work / f"command-{number}.json" for number in range(len(item.commands))]
    with log.open("ab") as file:
        for command, done in zip(item.commands, ended, strict=True):
            if done.is_file():
                continue
            began = time.monotonic()
            words = [word.replace(WORK, str(work)) for word in command.words]
            product = work / command.product if command.product else None
            if product is None or not product.is_file():
                left_s = limit_s - (began - begin)
                code = bounded([sys.executable, *words], dict(os.environ), file, left_s)
                if code not in command.ok:
                    raise Failed(f"{shlex.join(command.words)}: exit code {code}, {last_line(log)}")
            write(done, {"seconds": time.monotonic() - began})
    try:
        facts = {
            "experiment": item.name,
            "commands": [shlex.join(command.words) for command in item.commands],
            "seconds": [json.loads(done.read_text())["seconds"] for done in ended],
            **read_results([work / name for name in item.results]),
        }
        if facts.get("skipped") and not facts["passed"] + facts["failed"]:
            raise Failed(f"all {facts['skipped']} tests were skipped")
        for source, ending in item.kept:
            shutil.copyfile(work / source, out / f"{item.name}{ending}")
    except (OSError, ValueError, ElementTree.ParseError) as why:
        raise Failed(f"no result: {why}") from why
    finally:
        for done in ended:  # replaced by the result; without one, the commands run again
            done.unlink()
    write(out / f"{item.name}.json", facts)


def bounded(
    command: Sequence[str], environment: dict[str, str], log: IO[bytes], limit_s: float
) -> int:
    """Run a command for at most `limit_s` seconds, and return its exit code."""
    process = subprocess.Popen(
        command, env=environment, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT
    )
    return wait_for(process, limit_s)


def wait_for(process: subprocess.Popen[bytes], limit_s: float) -> int:
    """Wait for a process and return its exit code; past its limit it is terminated, then killed."""
    try:
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(max(0.0, limit_s))
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(GRACE_S) or 1
    finally:  # nothing may stay on the GPU
        process.kill()
    return process.wait()


def recorded(path: Path) -> dict[str, Any]:
    """Read a result, complete or not; empty if there is no file."""
    return json.loads(path.read_text()) if path.is_file() else {}


def write(path: Path, facts: dict[str, Any]) -> None:
    """Write a result; the file is complete or does not exist."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    partial.replace(path)


def last_line(log: Path) -> str:
    """Return the last line of a log, or nothing."""
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
