"""metrics.jsonl: what is written is what is read, and damage is told apart from a killed run.

Not covered: a file system that loses flushed bytes (a crashed machine, not a killed run).
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_precision.config.errors import UserError
from megatron_precision.observe.metrics import (
    MetricsWriter,
    TruncatedMetricsWarning,
    cut_to,
    read_metrics,
)


class Recorder:
    """A sink that keeps what it is handed."""

    def __init__(self) -> None:
        self.events: list[dict[str, Any]] = []
        self.closed = 0

    def event(self, event: dict[str, Any]) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.closed += 1


def test_events_come_back_as_they_were_written(tmp_path: Path) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        first = writer.write("run", iteration=0, step=0, values={"config": {"a": {"b": [1, "x"]}}})
        second = writer.write("step", iteration=2, step=7, values={
            "loss/policy": -0.1, "precision/overflow_cause": "gradients", "precision/skipped": 1,
        })  # fmt: skip
        third = writer.write("iteration", iteration=2, step=7, values={
            "mismatch/seq_log_ratios": [0.25, -1e-9], "mismatch/num_tokens": 3,
        })  # fmt: skip
    events = read_metrics(path)
    assert events == [first, second, third]
    assert list(events[1])[:4] == ["event", "time_s", "iteration", "step"]
    assert (events[1]["iteration"], events[1]["step"], events[1]["loss/policy"]) == (2, 7, -0.1)
    assert 0 <= events[0]["time_s"] <= events[2]["time_s"] < 60


def test_non_finite_numbers_are_strings_in_the_file_and_numbers_again_when_read(
    tmp_path: Path,
) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write("step", iteration=0, step=1, values={
            "loss/grad_norm": math.inf, "loss/policy": math.nan,
            "mismatch/seq_log_ratios": [1.0, -math.inf],
        })  # fmt: skip
    line = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert (line["loss/grad_norm"], line["loss/policy"]) == ("inf", "nan")
    assert line["mismatch/seq_log_ratios"] == [1.0, "-inf"]
    (event,) = read_metrics(path)
    assert event["loss/grad_norm"] == math.inf
    assert math.isnan(event["loss/policy"])
    assert event["mismatch/seq_log_ratios"] == [1.0, -math.inf]


def test_sinks_get_the_event_that_is_returned_and_are_closed_once(tmp_path: Path) -> None:
    one, two = Recorder(), Recorder()
    with MetricsWriter(tmp_path / "metrics.jsonl", [one, two]) as writer:
        event = writer.write("eval", iteration=4, step=9, values={"eval/accuracy": 0.5})
    assert one.events == two.events == [event]
    assert one.closed == two.closed == 1


def test_a_killed_writer_leaves_every_event_it_wrote(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from megatron_precision.observe.metrics import MetricsWriter\n"
        "w = MetricsWriter(Path(sys.argv[1]))\n"
        "for i in range(3): w.write('eval', iteration=i, step=i, values={'eval/accuracy': i / 4})\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    killed = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=environment, check=False, timeout=60
    )
    assert killed.returncode == -signal.SIGKILL
    assert [event["eval/accuracy"] for event in read_metrics(path)] == [0, 0.25, 0.5]


def test_a_cut_last_line_is_left_out_and_reported(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = '{"event": "eval", "iteration": 0, "eval/accuracy": 0.5}\n'
    path.write_text(whole + '{"event": "step", "loss/po')
    with pytest.warns(TruncatedMetricsWarning, match=r"metrics\.jsonl: the last line is cut after"):
        events = read_metrics(path)
    assert [event["eval/accuracy"] for event in events] == [0.5]


def test_a_writer_continues_after_the_last_whole_event(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "eval", "iteration": 0}\n{"event": "eval", "itera')
    with MetricsWriter(path) as writer:
        writer.write("eval", iteration=1, step=4, values={})
    assert [event["iteration"] for event in read_metrics(path)] == [0, 1]


def test_a_writer_keeps_a_whole_last_line_that_lacks_its_newline(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "eval", "iteration": 0}')
    with MetricsWriter(path) as writer:
        writer.write("eval", iteration=1, step=4, values={})
    assert [event["iteration"] for event in read_metrics(path)] == [0, 1]


@pytest.mark.parametrize("damage", ['{"event": "st', "[1, 2]", '{"no_event": 1}', ""])
def test_damage_elsewhere_raises_with_file_and_line_number(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = '{"event": "eval", "iteration": 0}\n'
    path.write_text(whole + damage + "\n" + whole)
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_unknown_names_and_values_are_all_listed_and_nothing_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        with pytest.raises(ValueError, match="iteration 3, step 5") as error:
            writer.write("step", iteration=3, step=5, values={
                "loss/policy": 1.0, "accuracy": 1.0, "rewards/mean": 1.0, "loss/": 1.0,
                "loss/a/b": 1.0, "reward/mean": {"not": "a number"},
            })  # fmt: skip
        for name in ("'accuracy'", "'rewards/mean'", "'loss/'", "'loss/a/b'", "reward/mean is a"):
            assert name in str(error.value)
        assert "'loss/policy'" not in str(error.value)
        with pytest.raises(ValueError, match="unknown event"):
            writer.write("epoch", iteration=0, step=0, values={})
        with pytest.raises(ValueError, match="'config'"):
            writer.write("step", iteration=0, step=0, values={"config": {}})
    assert path.read_text() == ""


@pytest.mark.parametrize("cut", ["", '{"event": "it'])
def test_what_came_after_a_checkpoint_is_taken_back_but_not_its_own_event(
    tmp_path: Path, cut: str
) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        kept = [writer.write("iteration", iteration=n, step=n, values={}) for n in range(2)]
        size = writer.size
        kept.append(writer.write("checkpoint", iteration=2, step=2, values={}))
        writer.write("iteration", iteration=2, step=3, values={})
        writer.write("end", iteration=9, step=3, values={"status": "stopped", "error": ""})
    with path.open("a", encoding="utf-8") as file:
        file.write(cut)
    cut_to(path, size, 2)
    with MetricsWriter(path, elapsed_s=1000.0) as writer:
        kept.append(writer.write("resume", iteration=2, step=2, values={"checkpoint": "000002"}))
    assert read_metrics(path) == kept
    assert kept[-1]["time_s"] >= 1000.0


def test_a_checkpoint_without_its_event_takes_back_all_that_came_after(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        kept = [writer.write("iteration", iteration=0, step=1, values={})]
        size = writer.size
        writer.write("iteration", iteration=1, step=2, values={})
    cut_to(path, size, 1)
    assert read_metrics(path) == kept
