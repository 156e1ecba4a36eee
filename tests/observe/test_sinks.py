"""Console, TensorBoard and Weights & Biases show the events they are handed, and no more.

The last two are the real packages, writing into a temporary folder. Not covered: wandb's online
mode, which needs an account; tensorboardX.
"""

from __future__ import annotations

import io
import json
import math
import re
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_precision.config.schema import SinkConfig
from megatron_precision.observe import sinks as sinks_module
from megatron_precision.observe.metrics import MetricsWriter, Sink, read_metrics
from megatron_precision.observe.sinks import ConsoleSink, TensorBoardSink, WandbSink, make_sinks

EVENTS: list[dict[str, Any]] = [
    {"event": "run", "time_s": 0.0, "iteration": 0, "step": 0, "rank_count": 2,
     "config": {"recipe": "sanity.x", "precision": "fp16", "seed": 42, "algo": {"name": "PPO"}},
     "fingerprint": "aaa", "start_fingerprint": "bbb"},
    {"event": "eval", "time_s": 1.0, "iteration": 0, "step": 0, "eval/accuracy": 0.375},
    {"event": "step", "time_s": 9.0, "iteration": 0, "step": 1, "loss/grad_norm": math.inf,
     "precision/loss_scale": 65536.0, "precision/overflow_cause": "gradients"},
    {"event": "iteration", "time_s": 10.0, "iteration": 0, "step": 1, "reward/mean": 0.51234,
     "mismatch/k3_kl": 1.73e-6, "precision/loss_scale": 32768.0, "precision/skipped_total": 1,
     "throughput/tokens_per_s": 4812.3, "time/iteration_s": 8.0,
     "mismatch/seq_log_ratios": [0.5, -0.25, math.nan]},
    {"event": "iteration", "time_s": 20.0, "iteration": 1, "step": 2, "reward/mean": 0.6,
     "precision/loss_scale": 1.0, "time/iteration_s": 10.0},
    {"event": "eval", "time_s": 21.0, "iteration": 2, "step": 2, "eval/accuracy": 0.75},
    {"event": "end", "time_s": 22.0, "iteration": 2, "step": 2, "status": "failed",
     "error": "RuntimeError: boom", "time/total_s": 3723.0},
]  # fmt: skip


def feed(sink: Sink) -> None:
    for event in EVENTS:
        sink.event(event)
    sink.close()


def test_without_a_terminal_the_console_prints_plain_lines() -> None:
    stream = io.StringIO()
    feed(ConsoleSink(10, stream))
    lines = stream.getvalue().splitlines()
    assert lines == [
        "sanity.x | fp16 | PPO | seed 42 | 10 iterations | 2 ranks | run aaa | start bbb",
        # Iterations began at 2 s; one took 8 s, so nine more take 72 s.
        " 1/10 | reward 0.512 | eval@0 0.375 | k3 1.73e-06 | scale 2^15 | skips 1 | "
        "4,812 tokens/s | 8.0 s | ETA 1:12",
        " 2/10 | reward 0.600 | k3 - | scale 1 | skips - | - tokens/s | 10.0 s | ETA 1:12",
        "failed after 2/10 iterations | eval@2 0.750 | 1:02:03 in all | RuntimeError: boom",
    ]
    assert not re.search(r"[\x00-\x09\x0b-\x1f]", stream.getvalue())


def test_on_a_terminal_the_console_draws_a_bar_and_gives_the_cursor_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    stream = Terminal()
    feed(ConsoleSink(10, stream))
    shown = stream.getvalue()
    assert "iterations" in shown
    assert "2/10" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "reward 0.512 | eval@0 0.375" in shown
    assert shown.rfind("\x1b[?25h") > shown.rfind("\x1b[?25l") >= 0


def test_a_resumed_run_estimates_from_its_own_iterations_only() -> None:
    stream = io.StringIO()
    sink = ConsoleSink(10, stream)
    sink.event({"event": "iteration", "time_s": 5.0, "iteration": 7, "step": 8,
                "time/iteration_s": 5.0})  # fmt: skip
    assert stream.getvalue().rstrip().endswith("ETA 0:10")  # two iterations of 5 s are left


def test_make_sinks_makes_what_the_config_asks_for(tmp_path: Path) -> None:
    (only,) = make_sinks(SinkConfig(), tmp_path, 3)
    assert isinstance(only, ConsoleSink)
    first, second = make_sinks(SinkConfig(tensorboard=True), tmp_path, 3)
    assert isinstance(first, ConsoleSink)
    assert isinstance(second, TensorBoardSink)
    second.close()


def test_missing_packages_are_all_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"package wandb; .*package tensorboard or tensorboardX"):
        make_sinks(SinkConfig(wandb="offline", tensorboard=True), tmp_path, 3)


def test_tensorboard_holds_the_numbers_of_the_events(tmp_path: Path) -> None:
    feed(TensorBoardSink(tmp_path))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(tmp_path / "tensorboard"))
    read.Reload()
    assert [(p.step, p.value) for p in read.Scalars("eval/accuracy")] == [(0, 0.375), (2, 0.75)]
    assert [p.step for p in read.Scalars("loss/grad_norm")] == [1]  # by optimizer step
    assert [p.step for p in read.Scalars("reward/mean")] == [0, 1]  # by iteration
    assert [p.step for p in read.Scalars("precision/loss_scale")] == [1, 1, 2]
    (histogram,) = read.Histograms("mismatch/seq_log_ratios")
    assert (histogram.histogram_value.min, histogram.histogram_value.max) == (-0.25, 0.5)
    assert histogram.histogram_value.num == 2  # the one that is not finite has no place in it


@pytest.fixture
def proxy() -> Iterator[tuple[int, list[bytes]]]:
    """A listener that stands in for the whole network; (its port, what was asked of it)."""
    asked: list[bytes] = []
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:  # closed: the test is over
                return
            with connection:
                asked.append(connection.recv(200))

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield port, asked
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(timeout=10)


def test_wandb_offline_writes_into_the_run_folder_and_asks_nothing_of_the_network(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, proxy: tuple[int, list[bytes]],
) -> None:  # fmt: skip
    port, asked = proxy
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    run_dir = tmp_path / "run"
    feed(WandbSink("offline", run_dir))
    (transaction,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
    content = transaction.read_bytes()
    for text in (b"reward/mean", b"0.51234", b"sanity.x", b"mismatch/seq_log_ratios", b"histogram"):
        assert text in content
    assert asked == []


def test_a_run_that_goes_on_is_the_same_run_in_wandb(tmp_path: Path) -> None:
    for run_dir in (tmp_path / "run", tmp_path / "run", tmp_path / "another"):
        feed(WandbSink("offline", run_dir))
    ids = [path.stem for path in sorted(tmp_path.glob("run/wandb/offline-run-*/run-*.wandb"))]
    (other,) = tmp_path.glob("another/wandb/offline-run-*/run-*.wandb")
    assert len(ids) == 2
    assert set(ids) == {ids[0]} != {other.stem}


def test_a_wandb_that_cannot_be_reached_is_told_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(sinks_module, "_REACHED_WITHIN_S", 3)
    for _ in range(2):  # begun, and resumed
        feed(WandbSink("online", tmp_path / "run"))
        said = capsys.readouterr().err
        assert "Weights & Biases cannot be reached" in said
        assert "`wandb sync` uploads it later" in said
    kept = list(tmp_path.glob("run/wandb/offline-run-*/run-*.wandb"))
    assert len(kept) == 2
    assert len({path.stem for path in kept}) == 1
    assert all(b"0.51234" in path.read_bytes() for path in kept)


def test_every_sink_takes_a_whole_run_from_the_writer(
    tmp_path: Path, synthetic_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    source = read_metrics(
        synthetic_run(tmp_path / "source", "fp16", iterations=2) / "metrics.jsonl"
    )
    stamps = ("event", "time_s", "iteration", "step")
    sinks = make_sinks(SinkConfig(tensorboard=True), tmp_path / "run", 2)
    with MetricsWriter(tmp_path / "run" / "metrics.jsonl", sinks) as writer:
        for event in source:
            values = {name: value for name, value in event.items() if name not in stamps}
            writer.write(
                event["event"], iteration=event["iteration"], step=event["step"], values=values
            )
    copied = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [{**e, "time_s": 0} for e in copied] == [{**e, "time_s": 0} for e in source]
    assert json.dumps(copied)
    assert len(capsys.readouterr().out.splitlines()) == 4  # run, two iterations, end
