"""A trainer's checkpoint on one GPU, bit for bit, and a real run that is killed and goes on.

Not covered: whether the run that goes on is bit for bit the one that was never killed; kernels of
a GPU may add in another order every time.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_precision.config.schema import (
    LossScaleConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from megatron_precision.layouts.hf_config import hf_config
from tests.distributed.cases import Case
from tests.distributed.harness import run_distributed
from tests.distributed.oracle import DENSE, MOE, checkpoint, random_batch, random_hf_model
from tests.e2e import real_jobs
from tests.gpu.one_gpu import ONE

pytestmark = pytest.mark.gpu
TIED = dataclasses.replace(DENSE, tie_word_embeddings=True)


@pytest.mark.parametrize("model", [TIED, MOE], ids=["dense", "MoE"])
@pytest.mark.parametrize("offloaded", [0.0, 1.0])
def test_parameters_main_copies_and_moments_come_back_bit_for_bit(
    model: ModelConfig, offloaded: float, tmp_path: Path
) -> None:
    config = RunConfig(
        "test",
        precision="fp16",
        model=model,
        parallel=ONE,
        optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-8, weight_decay=0.1),
        loss_scale=LossScaleConfig("fixed_start", initial_scale=64.0),
        train=TrainConfig(micro_batch_size=2),
        memory=MemoryConfig(attention="fused", optimizer_offload=offloaded),
    )
    case = Case(config, checkpoint(model, random_hf_model(model, 0.2)), random_batch(model, 6))
    (tmp_path / "config.json").write_text(json.dumps(hf_config(model, "float32")))
    folder = str(tmp_path)
    found = run_distributed("resume_bodies.through_layouts", 1, case, folder, [ONE], folder)
    assert found["held"] == ["exp_avg", "exp_avg_sq", "param"]
    assert found["differing"] == []
    assert found["applied"] == 3


def test_a_run_that_was_killed_goes_on_without_gap_or_repetition(tmp_path: Path) -> None:
    one = {f"parallel__{name}": 1 for name in ("world_size", "tp_size", "rollout_tp_size")}
    recipe = ["sanity.tiny_dense", "--precision", "fp16"]
    made = real_jobs.torchrun(tmp_path, 1, "prepare", *recipe, *real_jobs.settings(**one))
    assert made.returncode == 0, made.stdout + made.stderr
    (facts,) = (tmp_path / "runs" / "cache").glob("*/start.json")
    words = ["train", *recipe, "--out", "run", "--start-from", str(facts.parent)]
    settings = real_jobs.settings(**one, train__iterations=5, checkpoint__every=1)
    out = tmp_path / "run"
    command = real_jobs.torchrun_command(1, *words, *settings)
    with real_jobs.started(command, tmp_path) as job:
        real_jobs.wait_until((out / "checkpoints" / "000002").is_dir, job)
        ranks = real_jobs.wait_until(lambda: real_jobs.find_ranks(Path("run"), 1), job)
        real_jobs.kill_all(job, ranks)
    before = real_jobs.events(out, "iteration")
    assert len(before) < 5
    finished = real_jobs.torchrun(tmp_path, 1, *words, "--resume", *settings)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    after = real_jobs.events(out, "iteration")
    assert [event["iteration"] for event in after] == [0, 1, 2, 3, 4]
    (resume,) = real_jobs.events(out, "resume")
    kept = resume["iteration"]
    assert kept >= 2
    assert after[:kept] == before[:kept]
    assert resume["not_identical"] == []
    assert all(event["sync/verified"] == 1 for event in after)
