"""Real jobs that die, are stopped, or meet: exit codes, reasons, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_precision.platform import process
from tests.e2e import real_jobs
from tests.e2e.real_jobs import Ranks

pytestmark = pytest.mark.slow

LONG = {"train__iterations": 100_000}
END_WITHIN_S = 60.0


def train_words(start: Path, out: str, **changed: object) -> list[str]:
    words = ["sanity.tiny_dense", "--out", out, "--start-from", str(start)]
    return [*words, *real_jobs.settings(**changed)]


def wait_for_iteration(job: subprocess.Popen[str], out: Path) -> Ranks:
    real_jobs.wait_until(lambda: real_jobs.events(out, "iteration"), job)
    ranks = real_jobs.find_ranks(Path(out.name))
    assert ranks is not None
    assert ranks.mapped, "the engine has shared memory"
    return ranks


def end_of(job: subprocess.Popen[str]) -> tuple[str, str]:
    began = time.monotonic()
    stdout, stderr = job.communicate(timeout=2 * END_WITHIN_S)
    assert time.monotonic() - began < END_WITHIN_S
    return stdout, stderr


def assert_metrics_are_readable(out: Path) -> None:
    """Every line is JSON, but for a last one that is cut."""
    *lines, last = (out / "metrics.jsonl").read_text(encoding="utf-8").split("\n")
    kinds = [json.loads(line)["event"] for line in lines]
    assert kinds[0] == "run"
    assert "iteration" in kinds
    assert last == "" or not last.endswith("}")


def test_a_rank_killed_inside_a_collective_ends_the_job_and_is_named(
    dense_start: Path, tmp_path: Path
) -> None:
    command = real_jobs.launch_command(*train_words(dense_start, "killed", **LONG))
    with real_jobs.started(command, tmp_path) as job:
        ranks = wait_for_iteration(job, tmp_path / "killed")
        # Stopped, it leaves its peer to wait in the next collective.
        os.kill(ranks.pids[1], signal.SIGSTOP)
        time.sleep(2.0)
        os.kill(ranks.pids[1], signal.SIGKILL)
        _, stderr = end_of(job)
    assert job.returncode == 1
    shown = stderr.splitlines()
    assert "the job failed" in shown[0]
    assert shown[1] == "rank 1 was killed by SIGKILL; it could leave no traceback."
    assert_metrics_are_readable(tmp_path / "killed")
    real_jobs.assert_nothing_left(ranks)


def test_a_rank_that_raises_in_the_loop_is_shown_and_not_its_peers_broken_collective(
    dense_start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = real_jobs.launch_command(*train_words(dense_start, "raised", **LONG))
    fault = {"rank": 1, "phase": "train", "iteration": 1, "after_s": 0.0, "action": "raises"}
    monkeypatch.setenv("FAULT", json.dumps(fault))
    inject = Path(__file__).parents[1] / "faults" / "inject"
    with real_jobs.started(command, tmp_path, (inject,)) as job:
        ranks = real_jobs.wait_until(lambda: real_jobs.find_ranks(Path("raised")), job)
        stdout, stderr = job.communicate(timeout=real_jobs.PATIENCE_S)
    assert job.returncode == 1
    # It took part in one whole iteration of two steps.
    assert len(real_jobs.events(tmp_path / "raised", "iteration")) == 1
    shown = stderr.splitlines()
    assert "the job failed" in shown[0]
    assert shown[1] == "rank 1 failed first:"
    assert shown[2].startswith("Traceback")
    assert "ZeroDivisionError: the original reason, of this rank" in stderr
    assert stderr.count("Traceback (most recent call last)") == 1
    assert "Traceback" not in stdout
    assert_metrics_are_readable(tmp_path / "raised")
    real_jobs.assert_nothing_left(ranks)


@pytest.mark.parametrize(
    ("number", "to_the_group"), [(signal.SIGINT, True), (signal.SIGTERM, False)]
)
def test_a_stopped_job_says_so_and_leaves_nothing(
    dense_start: Path, tmp_path: Path, number: signal.Signals, to_the_group: bool
) -> None:
    # With 384 rollouts and one step an iteration, most of the time is sampling.
    changed = {"train__rollouts_per_prompt": 48, "train__prompts_per_mini_batch": 8, **LONG}
    command = real_jobs.launch_command(*train_words(dense_start, "stopped", **changed))
    with real_jobs.started(command, tmp_path) as job:
        ranks = wait_for_iteration(job, tmp_path / "stopped")
        # What Ctrl-C sends goes to the whole foreground group.
        (os.killpg if to_the_group else os.kill)(job.pid, number)
        _, stderr = end_of(job)
    assert job.returncode == 128 + number
    assert stderr.splitlines()[-1] == f"stopped by {number.name}"
    assert "Traceback" not in stderr
    assert_metrics_are_readable(tmp_path / "stopped")
    real_jobs.assert_nothing_left(ranks)


@pytest.fixture
def stale_segments(dense_start: Path, tmp_path: Path) -> Any:
    """Shared memory that a job left when it was killed together with its launcher and guard."""
    command = real_jobs.launch_command(*train_words(dense_start, "stale", **LONG))
    with real_jobs.started(command, tmp_path) as job:
        ranks = wait_for_iteration(job, tmp_path / "stale")
        # The guard first: it would clean up.
        for pid in [*real_jobs.processes_with(ranks.job), job.pid, *process.members(ranks.job)]:
            with contextlib.suppress(ProcessLookupError):  # ranks die with their parent
                os.kill(pid, signal.SIGKILL)
    left = process.segments(ranks.job)
    yield left
    process.end_job(ranks.job)
    for path in ranks.mapped:  # Python's own, which no name ties to the job
        path.unlink(missing_ok=True)


def test_two_runs_at_once_beside_a_stale_segment_compute_the_same(
    dense_start: Path, tmp_path: Path, stale_segments: list[Path]
) -> None:
    # vLLM's build for AVX2 has no shared-memory communicator: there a killed job leaves nothing.
    if "avx512f" in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        assert stale_segments, "the killed job left no shared memory, so this test shows nothing"
    first = real_jobs.launch_command(*train_words(dense_start, "first"))
    second = real_jobs.launch_command(*train_words(dense_start, "second"))
    with (
        real_jobs.started(first, tmp_path) as one,
        real_jobs.started(second, tmp_path) as other,
    ):
        for job in (one, other):
            stdout, stderr = job.communicate(timeout=real_jobs.PATIENCE_S)
            assert job.returncode == 0, stdout + stderr
    assert all(path.exists() for path in stale_segments), "a segment of another job was removed"
    same = [
        "reward/mean",
        "response/tokens_mean",
        "mismatch/k3_kl",
        "mismatch/seq_log_ratios",
        "precision/loss_scale",
        "sync/weight_version",
    ]
    metrics = [
        [[event[name] for name in same] for event in real_jobs.events(tmp_path / out, "iteration")]
        for out in ("first", "second")
    ]
    assert len(metrics[0]) == 2
    assert metrics[0] == metrics[1]
    losses = [
        [event["loss/grad_norm"] for event in real_jobs.events(tmp_path / out, "step")]
        for out in ("first", "second")
    ]
    assert losses[0] == losses[1]
