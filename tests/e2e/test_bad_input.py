"""Mistakes on the real command line: answered at once, all of them, with exit code 2."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.e2e import real_jobs


def test_an_existing_run_is_not_replaced_without_being_told_to(tmp_path: Path) -> None:
    earlier = tmp_path / "run" / "metrics.jsonl"
    earlier.parent.mkdir()
    earlier.write_text("{}\n", encoding="utf-8")
    finished = real_jobs.launch(tmp_path, "sanity.tiny_dense", "--out", "run")
    assert finished.returncode == 2
    assert "an earlier run" in finished.stderr
    assert "--overwrite" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert earlier.read_text(encoding="utf-8") == "{}\n"


@pytest.mark.parametrize("way", ["launch", "by hand"])
def test_a_layout_that_does_not_divide_lists_all_problems_and_starts_nothing(
    tmp_path: Path, way: str
) -> None:
    words = ["sanity.tiny_dense", "--out", "run", "--set", "parallel.tp_size=3",
             "parallel.rollout_tp_size=3", "train.prompts_per_mini_batch=5"]  # fmt: skip
    module = [sys.executable, *real_jobs.module_words("train", *words)]
    python, *rest = real_jobs.launch_command(*words) if way == "launch" else module
    finished = real_jobs.run([python, "-X", "importtime", *rest], tmp_path)
    assert finished.returncode == 2
    for wrong in ("world_size by tp_size", "num_attention_heads by parallel.tp_size",
                  "world_size by parallel.rollout_tp_size", "prompts_per_mini_batch"):  # fmt: skip
        assert wrong in finished.stderr, finished.stderr
    assert "Traceback" not in finished.stderr
    imported = {line.split("|")[-1].strip() for line in finished.stderr.splitlines()}
    assert "megatron_precision.checks.settings" in imported
    # No process group was opened: without torch there is none.
    assert not imported & {"torch", "nemo_run", "megatron.core", "vllm"}
    assert not (tmp_path / "run").exists()


def test_a_start_that_is_not_there_is_named_with_the_command_that_makes_it(
    tmp_path: Path,
) -> None:
    finished = real_jobs.torchrun(tmp_path, 2, "train", "sanity.tiny_dense", "--out", "run")
    # torchrun ends with 1 whatever its ranks end with.
    assert finished.returncode != 0
    assert "there is no prepared start to train from" in finished.stderr
    assert "megatron_precision prepare sanity.tiny_dense" in finished.stderr
    assert not (tmp_path / "run").exists()
