"""Dense, from nothing, through `launch.py`: prepare, train in FP16, report. Real engines."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import real_jobs


@pytest.fixture(scope="module")
def iterations(dense_run: Any) -> list[dict[str, Any]]:
    return real_jobs.events(dense_run.run, "iteration")


def test_a_start_is_made_first_and_is_right_sometimes(dense_run: Any) -> None:
    facts = json.loads((dense_run.start / "start.json").read_text(encoding="utf-8"))
    assert 0.2 < facts["accuracy"] < 0.8
    lines = (dense_run.start / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    assert facts["perfectible"] == {"asked": 32, "kept": len(lines)}
    assert all(0.2 <= json.loads(line)["accuracy"] <= 0.8 for line in lines)


def test_the_console_shows_the_runs_own_lines_and_nothing_else(dense_run: Any) -> None:
    stdout = dense_run.finished.stdout.splitlines()
    assert stdout[0].startswith("preparing the start of sanity.tiny_dense in runs/cache/")
    assert stdout[-1] == "run folder: run"
    assert [line.split(" | ")[0] for line in stdout if " | " in line][1:3] == ["1/2", "2/2"]
    assert dense_run.finished.stderr == ""


def test_the_first_and_the_last_line_say_what_ran_and_how_it_ended(dense_run: Any) -> None:
    (run,) = real_jobs.events(dense_run.run, "run")
    assert run["config"] == json.loads((dense_run.run / "config.json").read_text())
    assert run["start_fingerprint"] == dense_run.start.name
    assert run["rank_count"] == 2
    (end,) = real_jobs.events(dense_run.run, "end")
    assert (end["status"], end["error"]) == ("completed", "")


def test_rewards_are_those_of_a_start_that_is_right_sometimes(
    iterations: list[dict[str, Any]],
) -> None:
    assert len(iterations) == 2
    for event in iterations:
        assert 0.0 < event["reward/mean"] < 1.0
        # b1+2=3,c3+4=7 is the shortest worked sum of three terms, with its end token.
        assert 14 <= event["response/tokens_mean"] <= 48


def test_engine_and_trainer_differ_by_what_fp16_rounds_away(
    iterations: list[dict[str, Any]],
) -> None:
    for event in iterations:
        # Equal weights in two kernels: not the same bits, and no more apart than 2^-11 explains.
        assert 1e-9 < event["mismatch/k3_kl"] < 1e-4
        assert 0.0 < event["mismatch/abs_diff_mean"] < 1e-2
        assert 0.99 < event["mismatch/ess"] <= 1.0
        tokens = event["response/tokens_mean"] * 32
        assert event["mismatch/num_tokens"] == pytest.approx(tokens)
        assert len(event["mismatch/seq_log_ratios"]) == 32


def test_every_step_is_applied_synced_and_verified(
    dense_run: Any, iterations: list[dict[str, Any]]
) -> None:
    steps = real_jobs.events(dense_run.run, "step")
    assert [step["precision/skipped"] for step in steps] == [0, 0, 0, 0]
    assert all(step["loss/grad_norm"] > 0 for step in steps)
    assert [event["sync/weight_version"] for event in iterations] == [2, 4]
    assert [event["sync/verified"] for event in iterations] == [1, 1]
    # Rank 0 has half of what tensor parallelism divides of 402,176 weights, and all norms.
    assert all(402_176 < event["sync/bytes"] < 1.1 * 402_176 for event in iterations)
    assert all(event["sync/received_bytes"] < 0.05 * 402_176 for event in iterations)


def test_the_loss_scale_is_calibrated_to_a_power_of_two(
    iterations: list[dict[str, Any]],
) -> None:
    scales = {event["precision/loss_scale"] for event in iterations}
    assert len(scales) == 1
    mantissa, exponent = math.frexp(scales.pop())
    assert mantissa == 0.5
    assert 8 < exponent < 40


def test_each_job_keeps_its_logs_in_its_own_folder(dense_run: Any) -> None:
    assert list((dense_run.run / "launcher").rglob("train_*"))
    prepare = dense_run.start.with_name(dense_run.start.name + ".prepare")
    assert not list((prepare / "launcher").rglob("train_*"))


def test_the_report_command_makes_a_page_of_the_run(dense_run: Any, tmp_path: Path) -> None:
    words = real_jobs.module_words("report", str(dense_run.run), "--out", str(tmp_path / "r.html"))
    finished = real_jobs.run([sys.executable, *words], tmp_path)
    assert finished.returncode == 0, finished.stderr
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert page.rstrip().endswith("</html>")
    assert "FP16" in page
    assert f"report: {tmp_path / 'r.html'}" in finished.stdout
