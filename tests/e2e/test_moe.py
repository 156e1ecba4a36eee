"""MoE by hand under torchrun, in BF16 with an algorithm that needs no old log-probs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import real_jobs


@pytest.fixture(scope="module")
def finished(dense_start: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("moe")
    maker = Path(__file__).with_name("moe_start.py")
    made = real_jobs.run([sys.executable, str(maker), str(dense_start), "start"], folder)
    assert made.returncode == 0, made.stderr
    # The mismatch is asked for in iteration 0 and not in iteration 1.
    words = ["--precision", "bf16", "--algo", "PG-Seq-IS", "--mismatch-every", "2"]
    job = real_jobs.torchrun(
        folder, 2, "train", "sanity.tiny_moe", "--out", "run", "--start-from", "start", *words,
        *real_jobs.settings(model__moe_intermediate_size=384),
    )  # fmt: skip
    assert job.returncode == 0, job.stdout + job.stderr
    return folder / "run", job


def test_it_trains_and_every_sync_is_verified(finished: Any) -> None:
    out, _ = finished
    iterations = real_jobs.events(out, "iteration")
    assert [event["sync/verified"] for event in iterations] == [1, 1]
    assert [event["sync/weight_version"] for event in iterations] == [2, 4]
    assert [event["precision/skipped_total"] for event in iterations] == [0, 0]
    # The router picks among equal experts: the model is as often right as the dense one.
    assert all(0.0 < event["reward/mean"] < 1.0 for event in iterations)
    assert any(step["loss/grad_norm"] > 0 for step in real_jobs.events(out, "step"))
    assert real_jobs.events(out, "end")[0]["status"] == "completed"


def test_the_mismatch_is_measured_without_a_pass_and_covers_the_batch_when_asked(
    finished: Any,
) -> None:
    asked, unasked = real_jobs.events(finished[0], "iteration")
    tokens = [round(event["response/tokens_mean"] * 32) for event in (asked, unasked)]
    assert asked["mismatch/num_tokens"] == tokens[0]
    assert asked["time/old_logprobs_s"] > 0
    # The first of two mini-batches, before its step, and no other.
    assert 0 < unasked["mismatch/num_tokens"] < tokens[1]
    assert len(unasked["mismatch/seq_log_ratios"]) == 16
    assert "time/old_logprobs_s" not in unasked
    for event in (asked, unasked):
        assert 1e-7 < event["mismatch/k3_kl"] < 1e-1


def test_typed_by_hand_the_console_shows_the_run_and_no_traceback(finished: Any) -> None:
    _, job = finished
    shown = job.stdout.splitlines()
    assert shown[0].startswith("sanity.tiny_moe | bf16 | PG-Seq-IS | seed 42 | 2 iterations")
    assert [line.split(" | ")[0] for line in shown[1:3]] == ["1/2", "2/2"]
    assert job.stderr == ""
