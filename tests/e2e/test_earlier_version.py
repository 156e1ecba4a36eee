"""A run, a checkpoint and a dump of version 0.1.0 are read; those of a later one are refused.

`run_0_1_0.tar.xz` is a run of one iteration on one rank, with its tiny model and its prompts.
"""

from __future__ import annotations

import json
import sys
import tarfile
from pathlib import Path

import pytest

from megatron_precision.cli.main import main
from tests.e2e import real_jobs


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    with tarfile.open(Path(__file__).with_name("run_0_1_0.tar.xz")) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


def test_its_checkpoint_is_resumed(earlier: Path) -> None:
    words = ["train", "--config", "run/config.json", "--out", "run", "--resume"]
    done = real_jobs.torchrun(earlier, 1, *words, "--set", "train.iterations=2")
    assert done.returncode == 0, done.stdout + done.stderr
    (resumed,) = real_jobs.events(earlier / "run", "resume")
    assert resumed["checkpoint"] == "000001"
    assert resumed["damaged"] == []
    assert [event["iteration"] for event in real_jobs.events(earlier / "run", "iteration")] == [
        0,
        1,
    ]
    assert real_jobs.events(earlier / "run", "end")[-1]["status"] == "completed"


def test_its_dump_is_replayed(earlier: Path) -> None:
    command = [*real_jobs.module_words("replay", "run/dumps/000000", "--out", "replayed")]
    done = real_jobs.run([sys.executable, *command], earlier)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((earlier / "replayed" / "replay.json").read_text(encoding="utf-8"))
    assert found
    assert "trainer - rollout" in done.stdout


def test_a_checkpoint_of_a_later_version_is_refused_with_the_version_and_what_to_do(
    earlier: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = earlier / "run/checkpoints/000001/trainer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"version": 2}), encoding="utf-8")
    monkeypatch.chdir(earlier)
    words = ["--out", "run", "--resume", "--set", "train.iterations=2"]
    assert main(["train", "--config", "run/config.json", *words]) == 2
    error = capsys.readouterr().err
    assert "another format version" in error
    assert "got       2" in error or "2" in error.partition("got")[2].splitlines()[0]
    assert "the version of megatron_precision that wrote it" in error


def test_a_dump_of_a_later_format_is_refused_with_the_format_and_what_to_do(
    earlier: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = earlier / "run/dumps/000000/dump.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": 99}), encoding="utf-8")
    monkeypatch.chdir(earlier)
    assert main(["replay", "run/dumps/000000"]) == 2
    error = capsys.readouterr().err
    assert "another format" in error
    assert "99" in error
    assert "the version of megatron_precision that wrote it" in error
