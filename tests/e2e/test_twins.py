"""Every large recipe runs: its twin, two processes, real Megatron and real vLLM, two iterations.

Not covered: what differs on a GPU (kernels, NCCL), and the recipes' own sizes.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import recipes
from megatron_precision.config.schema import RunConfig, to_dict
from recipes.twins import twin
from tests.e2e import real_jobs

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
WRITE = """
import sys
from pathlib import Path
import chat_start
from megatron_precision.config.overrides import config_from_file
folder = Path(sys.argv[1])
chat_start.write_model(folder / "model", config_from_file(folder / "twin.json").model)
chat_start.write_prompts(folder / "sums.jsonl", chat_start.SUMS)
chat_start.write_prompts(folder / "held_out.jsonl", chat_start.HELD_OUT)
"""
FILES = [
    "start.checkpoint=model",
    "task.train_sets=sums=sums.jsonl",
    "task.eval_sets=held_out=held_out.jsonl",
    "task.scorer=chat_scorers:parity",
]


def run_twin(small: RunConfig, folder: Path) -> list[dict[str, Any]]:
    """Train the twin as a user trains a recipe on files of their own; its iterations."""
    (folder / "twin.json").write_text(json.dumps(to_dict(small)), encoding="utf-8")
    environment = real_jobs.environment(HERE)
    subprocess.run(
        [sys.executable, "-c", WRITE, str(folder)], check=True, cwd=folder, env=environment
    )
    words = ["train", "--config", "twin.json", "--out", "run", "--set", *FILES]
    command = real_jobs.torchrun_command(2, *words)
    with real_jobs.started(command, folder, python_path=(HERE,)) as job:
        out, err = job.communicate(timeout=real_jobs.PATIENCE_S)
    assert job.returncode == 0, out + err
    found: list[dict[str, Any]] = real_jobs.events(folder / "run", "iteration")
    return found


def per_token(event: dict[str, Any]) -> float:
    """The median sequence's absolute log-ratio, a token.

    Not the k3 KL: one token that the engines route to unlike experts decides it for so few.
    """
    ratios = [abs(ratio) for ratio in event["mismatch/seq_log_ratios"]]
    return statistics.median(ratios) / float(event["response/tokens_mean"])


@pytest.mark.parametrize("name", recipes.sized_names())
def test_the_twin_of_a_recipe_trains(name: str, tmp_path: Path) -> None:
    iterations = run_twin(twin(recipes.build(name)), tmp_path)
    assert len(iterations) == 2
    for event in iterations:
        assert event["sync/verified"] == 1
        assert 0 < per_token(event) < 1e-3  # FP16 on both sides; eight times that in BF16
        assert event["mismatch/num_tokens"] > 0


@pytest.mark.parametrize("precision", ["bf16", "bf16/fp32"])
def test_a_twin_runs_in_other_precisions(precision: str, tmp_path: Path) -> None:
    small = twin(recipes.build("moe.grpo_token_tis", precision))
    iterations = run_twin(small, tmp_path)
    assert [event["sync/verified"] for event in iterations] == [1, 1]


def test_the_pipeline_of_a_recipe_runs_on_packed_sequences(tmp_path: Path) -> None:
    packed = recipes.build("moe.pg_seq_tis", overrides=["train.packed_sequences=true"])
    iterations = run_twin(twin(packed, pipeline=True), tmp_path)
    for event in iterations:
        assert event["sync/verified"] == 1
        assert 0 < per_token(event) < 1e-3
    steps = real_jobs.events(tmp_path / "run", "step")
    # The end of a row alone is padded, to a multiple of eight.
    assert all(event["throughput/padding_share"] < 0.1 for event in steps)
