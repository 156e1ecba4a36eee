"""Ctrl-C and SIGTERM: one line, the shell's exit code, and nothing left behind."""

from __future__ import annotations

import dataclasses
import importlib
import json
import math
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from megatron_precision.config.errors import UserError
from megatron_precision.layouts.architectures import hf_shapes
from megatron_precision.layouts.hf_config import hf_config
from tests.distributed.oracle import DENSE
from tools.checkpoint_convert.cli import main
from tools.checkpoint_convert.workers import run_tasks

ROOT = Path(__file__).resolve().parents[2]


def zeros(folder: Path, vocab_size: int) -> Path:
    """A checkpoint of zeros, large enough to be stopped in the middle, that takes no disk."""
    model = dataclasses.replace(DENSE, vocab_size=vocab_size)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(hf_config(model, "bfloat16")))
    header, end = {}, 0
    for name, shape in hf_shapes(model).items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return folder


def until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 150  # workers that load torch on a busy machine
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.001)


@pytest.mark.parametrize(
    ("number", "line"), [(signal.SIGTERM, "terminated\n"), (signal.SIGINT, "interrupted\n")]
)
def test_a_conversion_that_is_stopped_anywhere_leaves_nothing(
    number: signal.Signals, line: str, tmp_path: Path
) -> None:
    hf, out, said = zeros(tmp_path / "hf", 400_000), tmp_path / "out", tmp_path / "said"
    (tmp_path / "whole").mkdir()
    for name in ("first", "timed"):  # the first loads torch, which the children need not
        began = time.monotonic()
        assert main(["import", str(hf), str(out)]) == 0
        longest_s = time.monotonic() - began
        out.rename(tmp_path / "whole" / name)
    chance, stopped, tried = random.Random(0), 0, 0
    while stopped < 8:
        tried += 1
        assert tried < 60, f"{stopped} conversions of {tried} were stopped before they were whole"
        child = os.fork()
        if child == 0:
            code = 99
            try:
                with open(said, "w", encoding="ascii") as sys.stderr:
                    code = main(["import", str(hf), str(out)])
            finally:
                os._exit(code)
        until((tmp_path / ".out.lock").exists)
        time.sleep(chance.random() * longest_s)
        os.kill(child, number)
        os.kill(child, number)  # a second one does not disturb the first's cleaning up
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code != 0:
            assert (code, said.read_text()) == (128 + number, line)
            stopped += 1
        else:  # the machine is faster than it was
            longest_s *= 0.8
        # It may have been whole when the signal came.
        assert {path.name for path in tmp_path.iterdir()} - {"out"} == {"hf", "whole", "said"}
        if out.exists():
            assert (out / "conversion_manifest.json").exists()
            out.rename(tmp_path / "whole" / f"{tried}")


@pytest.mark.parametrize(
    ("moment", "number", "line"),
    [
        ("", signal.SIGINT, "interrupted\n"),
        pytest.param(
            "out.partial/*.distcp", signal.SIGINT, "interrupted\n", marks=pytest.mark.slow
        ),
        ("out.partial/*.distcp", signal.SIGTERM, "terminated\n"),
    ],
)
def test_a_conversion_by_several_processes_is_stopped_as_one(
    moment: str, number: signal.Signals, line: str, tmp_path: Path
) -> None:
    """While the workers start, and while they write. Ctrl-C goes to all, SIGTERM to the first."""
    hf = zeros(tmp_path / "hf", 3_000_000)
    words = ["-m", "tools.checkpoint_convert", "import", str(hf), str(tmp_path / "out")]
    running = subprocess.Popen(
        [sys.executable, *words, "--workers", "2"],
        cwd=ROOT, start_new_session=True, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if moment:
        until(lambda: running.poll() is not None or list(tmp_path.glob(moment)))
    else:
        first = psutil.Process(running.pid)
        until(lambda: sum("spawn_main" in " ".join(c.cmdline()) for c in first.children()) == 2)
        time.sleep(0.3)  # in the middle of their imports
    (os.killpg if number == signal.SIGINT else os.kill)(running.pid, number)
    _, said = running.communicate(timeout=60)
    assert (running.returncode, said) == (128 + number, line)
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]

    def gone() -> bool:
        try:
            os.killpg(running.pid, 0)
        except ProcessLookupError:
            return True
        return False

    until(gone)


@pytest.mark.parametrize(
    ("ends", "kind", "told"),
    [
        ("raise ValueError('refused')", ValueError, "^refused$"),
        ("os.kill(os.getpid(), signal.SIGKILL)", UserError, "a worker was killed"),
    ],
)
def test_when_one_worker_ends_the_others_are_not_waited_for(
    ends: str, kind: type[Exception], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = f"""
import os, signal, time
class Ends:
    def run(self, progress):
        {ends}
class Sleeps:
    def run(self, progress):
        time.sleep(50)
"""
    (tmp_path / "worker_tasks.py").write_text(code, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "worker_tasks", raising=False)
    tasks = importlib.import_module("worker_tasks")
    began = time.monotonic()
    with pytest.raises(kind, match=told):
        run_tasks([tasks.Sleeps(), tasks.Ends()], 2, lambda _bytes: None)
    assert time.monotonic() - began < 40
    assert not multiprocessing.active_children()
