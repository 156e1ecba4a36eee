"""`make sanity`: what runs, in which order, and what becomes of an earlier result.

The jobs themselves are replaced; the end-to-end tests run them.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_precision.checkpoint import run_folder
from megatron_precision.cli import sanity
from megatron_precision.config.errors import UserError
from megatron_precision.config.schema import RunConfig
from megatron_precision.launch import local
from megatron_precision.launch.jobs import Job
from megatron_precision.rl.algorithms import ALGORITHMS


class Jobs:
    """Stands in for the launcher and the report, and remembers what it was asked for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.asked: list[str] = []
        self.code_of = {"prepare": 0, "bf16": 0, "fp16": 0}
        monkeypatch.setattr(local, "ensure_start", self._ensure_start)
        monkeypatch.setattr(local, "run_job", self._run_job)
        monkeypatch.setattr(sanity, "report", self._report)

    def _ensure_start(self, config: RunConfig) -> int:
        self.asked.append("prepare")
        return self.code_of["prepare"]

    def _run_job(self, job: Job) -> int:
        values = json.loads((job.folder / run_folder.CONFIG).read_text(encoding="utf-8"))
        assert job.command_line[:3] == ["train", "--config", str(job.folder / "config.json")]
        self.asked.append(values["precision"])
        return self.code_of[values["precision"]]

    def _report(self, runs: list[Path], out: Path) -> None:
        self.asked.append("report " + " ".join(path.name for path in runs))
        out.touch()


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> Jobs:
    return Jobs(monkeypatch)


def test_the_start_is_prepared_then_both_precisions_train_then_the_report(
    jobs: Jobs, tmp_path: Path
) -> None:
    assert sanity.run("dense", tmp_path / "sanity-dense") == 0
    assert jobs.asked == ["prepare", "bf16", "fp16", "report bf16 fp16"]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_both_precisions_train_with_the_algorithm_that_is_asked_for(
    jobs: Jobs, tmp_path: Path, algorithm: str
) -> None:
    assert sanity.run("moe", tmp_path / "out", algo=algorithm) == 0
    for precision in ("bf16", "fp16"):
        path = tmp_path / "out" / precision / run_folder.CONFIG
        assert json.loads(path.read_text(encoding="utf-8"))["algo"]["name"] == algorithm


def test_a_second_call_works_and_keeps_the_first_result(jobs: Jobs, tmp_path: Path) -> None:
    out = tmp_path / "sanity-moe"
    assert sanity.run("moe", out) == 0
    (out / "mark").touch()
    assert sanity.run("moe", out) == 0
    assert (tmp_path / "sanity-moe.previous" / "mark").exists()
    assert (out / "report.html").exists()
    assert not (out / "mark").exists()


@pytest.mark.parametrize(
    ("failing", "asked"),
    [
        ("prepare", ["prepare"]),
        ("bf16", ["prepare", "bf16"]),
        ("fp16", ["prepare", "bf16", "fp16"]),
    ],
)
def test_the_first_job_that_fails_ends_it_with_its_exit_code(
    jobs: Jobs, tmp_path: Path, failing: str, asked: list[str]
) -> None:
    jobs.code_of[failing] = 143
    assert sanity.run("dense", tmp_path / "sanity-dense") == 143
    assert jobs.asked == asked


def test_two_at_once_do_not_share_a_folder(jobs: Jobs, tmp_path: Path) -> None:
    out = tmp_path / "sanity-dense"
    with (
        local.exclusive(tmp_path / "sanity-dense.lock"),
        pytest.raises(UserError, match="another run"),
    ):
        sanity.run("dense", out)
    assert jobs.asked == []


def test_bad_overrides_start_nothing(jobs: Jobs, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean"):
        sanity.run("dense", tmp_path / "sanity-dense", ["trian.iterations=1"])
    assert jobs.asked == []
    assert list(tmp_path.iterdir()) == []
