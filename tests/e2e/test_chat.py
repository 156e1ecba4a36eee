"""A run on a user's own checkpoint, files of chat prompts and scorer, through torchrun.

Not covered: a model that has learned anything; math-verify on real responses (tests/rewards).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import real_jobs

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
CHAT = {
    "task.name": "chat",
    "start.kind": "checkpoint",
    "start.checkpoint": "model",
    "task.train_sets": "sums=sums.jsonl@2,others=others.jsonl",
    "task.eval_sets": "held_out=held_out.jsonl,others=others.jsonl",
    "task.scorer": "chat_scorers:parity",
    "task.scorer_time_limit_s": "0.5",
    "rollout.max_response_tokens": "24",
    "rollout.max_num_seqs": "64",
    "rollout.kv_cache_mib": "32",
    "parallel.rollout_tp_size": "1",
    "train.iterations": "2",
    "train.prompts_per_iteration": "6",
    "train.rollouts_per_prompt": "4",
    "train.prompts_per_mini_batch": "3",
    "eval.every": "0",
    "eval.samples_per_question": "2",
    "eval.top_p": "0.9",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("chat")
    environment = real_jobs.environment()
    subprocess.run(
        [sys.executable, str(HERE / "chat_start.py"), str(made)], check=True, env=environment
    )
    return made


@pytest.fixture(scope="module")
def run(folder: Path) -> Path:
    words = ["train", "sanity.tiny_dense", "--out", "run", "--algo", "PPO-Token-TIS"]
    sets = ["--set", *(f"{name}={value}" for name, value in CHAT.items())]
    command = real_jobs.torchrun_command(2, *words, *sets)
    with real_jobs.started(command, folder, python_path=(HERE,)) as job:
        out, err = job.communicate(timeout=real_jobs.PATIENCE_S)
    assert job.returncode == 0, out + err
    assert "the scorer raised" in err
    return folder / "run"


def answers(run: Path, iteration: int) -> list[dict[str, Any]]:
    text = (run / "answers" / f"{iteration:06d}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_repeats_and_prompts_that_are_too_long_are_counted(run: Path) -> None:
    (started,) = real_jobs.events(run, "run")
    assert started["prompts"]["sums"] == {
        "prompts": 12, "repeats": 1, "too_long": 1, "longest_tokens": 65,
    }  # fmt: skip
    assert started["prompts"]["others"]["prompts"] == 3


def test_rewards_are_the_scorers_and_a_failed_grade_costs_its_reward_alone(run: Path) -> None:
    for iteration in real_jobs.events(run, "iteration"):
        # Two of three questions of a third of the prompts cannot be graded.
        assert 0 < iteration["reward/mean"] < 1
        assert 0 <= iteration["reward/failed_share"] <= 2 / 3
    text = (run / "failed_grades.txt").read_text(encoding="utf-8")
    assert "this scorer has a mistake" in text
    assert "timed out" in text
    assert "train, iteration" in text
    assert "eval, others, iteration 0" in text


def test_evaluation_reports_every_set_and_keeps_the_answers(run: Path) -> None:
    first, last = real_jobs.events(run, "eval")
    assert (first["iteration"], last["iteration"]) == (0, 2)
    for event in (first, last):
        found = answers(run, event["iteration"])
        assert len(found) == 2 * (3 + 3)
        for name in ("held_out", "others"):
            rewards = [item["reward"] for item in found if item["set"] == name]
            assert event[f"eval/{name}_avg_at_2"] == pytest.approx(sum(rewards) / 6)
            assert event[f"eval/{name}_pass_at_1"] == event[f"eval/{name}_avg_at_2"]
            pairs = zip(rewards[::2], rewards[1::2], strict=True)
            assert event[f"eval/{name}_pass_at_2"] == pytest.approx(sum(map(max, pairs)) / 3)
        parity = [
            sum(map(str.isalpha, item["response"])) % 2 == 1
            for item in found
            if item["set"] == "held_out"
        ]
        assert parity == [item["reward"] == 1.0 for item in found if item["set"] == "held_out"]
        assert all("<eos>" not in item["response"] for item in found)


def test_the_trainer_and_the_engine_hold_the_same_sharded_checkpoint(run: Path) -> None:
    (first, *_) = real_jobs.events(run, "iteration")
    assert first["mismatch/k3_kl"] < 1e-4
    assert first["sync/verified"] == 1


def test_the_perfectible_set_is_what_the_checkpoint_answers_sometimes_however_it_was_made(
    folder: Path,
) -> None:
    """Stopped after the first lot of questions it goes on, on one rank as on two with FP32."""
    settings = {**CHAT, "perfectible.samples_per_question": "5", "rollout.max_num_seqs": "5"}
    del settings["task.eval_sets"], settings["parallel.rollout_tp_size"]
    # In 16 bits another layout rounds otherwise, and now and then samples another token.
    words = ["perfectible", "sanity.tiny_dense", "--precision", "fp32", "--set"]
    words += [f"{name}={value}" for name, value in settings.items()]
    whole = perfectible(folder, words, "whole.jsonl")

    one = [*words, "parallel.world_size=1", "parallel.tp_size=1", "parallel.rollout_tp_size=1"]
    command = [sys.executable, *real_jobs.module_words(*one, "--out", "stopped.jsonl")]
    progress = folder / "stopped.jsonl.progress"
    with real_jobs.started(command, folder, python_path=(HERE,)) as job:
        real_jobs.wait_until(lambda: progress.is_file() and progress.stat().st_size > 200, job)
        job.kill()
    seen = progress.read_text(encoding="utf-8").count("\n") - 1
    assert 0 < seen < 15
    with progress.open("a", encoding="utf-8") as file:
        file.write('{"id": "cut')
    stopped = perfectible(folder, one, "stopped.jsonl")
    assert stopped == whole
    assert not progress.exists()

    kept = [json.loads(line) for line in whole.splitlines()]
    assert 0 < len(kept) < 15
    assert all(0.2 <= item["extra_info"]["accuracy"] <= 0.8 for item in kept)
    assert {item["reward_model"]["ground_truth"] for item in kept} == {"even", "odd"}


def perfectible(folder: Path, words: list[str], out: str) -> str:
    command = [sys.executable, *real_jobs.module_words(*words, "--out", out)]
    with real_jobs.started(command, folder, python_path=(HERE,)) as job:
        shown, wrong = job.communicate(timeout=real_jobs.PATIENCE_S)
    assert job.returncode == 0, shown + wrong
    assert "15 of 15 questions" in shown
    return (folder / out).read_text(encoding="utf-8")
