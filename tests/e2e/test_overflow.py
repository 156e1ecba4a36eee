"""An FP16 loss scale that is far too large at the start: skips are counted, then it trains."""

from __future__ import annotations

from itertools import accumulate
from pathlib import Path

import pytest

from tests.e2e import real_jobs

pytestmark = pytest.mark.slow


def test_skipped_steps_are_counted_change_no_version_and_end(
    dense_start: Path, tmp_path: Path
) -> None:
    words = real_jobs.settings(
        loss_scale__initial="fixed_start",
        loss_scale__initial_scale="2**40",
        loss_scale__hysteresis=1,
        train__iterations=6,
        train__prompts_per_mini_batch=1,
    )
    finished = real_jobs.launch(
        tmp_path, "sanity.tiny_dense", "--precision", "fp16", "--out", "run",
        "--start-from", str(dense_start), *words,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr

    steps = real_jobs.events(tmp_path / "run", "step")
    assert len(steps) == 6 * 8
    skipped = [step["precision/skipped"] for step in steps]
    # A group without variance has no gradient that could overflow, so skips need not be in a row.
    assert sum(skipped[:8]) >= 4
    trained = [s for s in steps[-16:] if not s["precision/skipped"] and s["loss/grad_norm"] > 0]
    assert len(trained) >= 4
    assert {step["precision/overflow_cause"] for step in steps if step["precision/skipped"]} == {
        "gradients"
    }
    assert {
        step["precision/overflow_cause"] for step in steps if not step["precision/skipped"]
    } == {""}
    # Every skip halves the scale, and nothing else moves it in so few steps.
    halvings = accumulate(skipped)
    assert [step["precision/loss_scale"] for step in steps] == [2.0 ** (40 - n) for n in halvings]

    iterations = real_jobs.events(tmp_path / "run", "iteration")
    total = list(accumulate(skipped))[7::8]
    assert [event["precision/skipped_total"] for event in iterations] == total
    applied = [8 * (number + 1) - count for number, count in enumerate(total)]
    assert [event["sync/weight_version"] for event in iterations] == applied
    assert all(event["sync/verified"] == 1 for event in iterations)


def test_a_run_that_overflows_at_the_smallest_scale_ends_with_advice(
    dense_start: Path, tmp_path: Path
) -> None:
    words = real_jobs.settings(
        loss_scale__initial="fixed_start",
        loss_scale__initial_scale="2**60",
        loss_scale__min_scale="2**60",
        loss_scale__hopeless_overflows=2,
        train__iterations=100,
    )
    finished = real_jobs.launch(
        tmp_path, "sanity.tiny_dense", "--precision", "fp16", "--out", "run",
        "--start-from", str(dense_start), *words,
    )  # fmt: skip
    assert finished.returncode == 2
    assert "2 optimizer steps in a row overflowed at the smallest loss scale" in finished.stderr
    assert "cause of the last: gradients" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert all(step["precision/skipped"] for step in real_jobs.events(tmp_path / "run", "step"))
    (end,) = real_jobs.events(tmp_path / "run", "end")
    assert end["status"] == "failed"
