"""Other layouts are a change of configuration: same start, same seed, same rollout layout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import real_jobs

pytestmark = pytest.mark.slow

TRAINER_LAYOUTS = {
    "tp2": {"parallel__tp_size": 2},
    "dp2": {"parallel__tp_size": 1},
    "pp2": {"parallel__tp_size": 1, "parallel__pp_size": 2},
}
ROLLOUT = ("reward/mean", "reward/accuracy", "response/tokens_mean", "response/tokens_max")


def train(folder: Path, start: Path, name: str, precision: str, **changed: object) -> Path:
    words = ["train", "sanity.tiny_dense", "--precision", precision, "--out", name,
             "--start-from", str(start), *real_jobs.settings(**changed)]  # fmt: skip
    alone = changed.get("parallel__world_size") == 1
    command = [sys.executable, *real_jobs.module_words(*words)]
    finished = real_jobs.run(command if alone else real_jobs.torchrun_command(2, *words), folder)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder / name


def first_rollouts(out: Path) -> list[float]:
    return [real_jobs.events(out, "iteration")[0][name] for name in ROLLOUT]


@pytest.fixture(scope="module")
def fp32_runs(dense_start: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("fp32")
    return {
        name: train(folder, dense_start, name, "fp32", **layout)
        for name, layout in TRAINER_LAYOUTS.items()
    }


def test_trainer_layouts_sample_the_same_rollouts_in_bf16(
    dense_start: Path, tmp_path: Path
) -> None:
    # The engine's layout is the same in each, so its numbers are the same to the bit.
    runs = [
        train(tmp_path, dense_start, name, "bf16", train__iterations=1, **layout)
        for name, layout in TRAINER_LAYOUTS.items()
    ]
    tp2, dp2, pp2 = map(first_rollouts, runs)
    assert 0.0 < tp2[0] < 1.0
    assert tp2 == dp2
    assert tp2 == pp2


@pytest.mark.parametrize("layout", ["dp2", "pp2"])
def test_trainer_layouts_agree_in_fp32(fp32_runs: dict[str, Path], layout: str) -> None:
    expected, found = (
        [step for step in real_jobs.events(fp32_runs[name], "step") if step["iteration"] == 0]
        for name in ("tp2", layout)
    )
    assert first_rollouts(fp32_runs["tp2"]) == first_rollouts(fp32_runs[layout])
    assert len(expected) == len(found) == 2
    for one, other in zip(expected, found, strict=True):
        for name in ("loss/grad_norm", "loss/entropy", "loss/ratio_mean", "loss/ratio_max"):
            assert other[name] == pytest.approx(one[name], rel=1e-3), name
        # Advantages cancel in a sum over responses of one length: some losses are next to 0.
        assert other["loss/policy"] == pytest.approx(one["loss/policy"], rel=1e-3, abs=1e-6)
    assert all(step["loss/grad_norm"] > 0 for step in expected)


def test_two_replicas_sample_what_one_samples(dense_start: Path, tmp_path: Path) -> None:
    # Seeds belong to requests. A replica that repeats the other, or leaves out a share, would
    # give other rewards and lengths than one engine that samples everything.
    layout = {"parallel__tp_size": 1, "parallel__rollout_tp_size": 1, "train__iterations": 1}
    two = train(tmp_path, dense_start, "two", "fp32", **layout)
    one = train(tmp_path, dense_start, "one", "fp32", **layout, parallel__world_size=1)
    assert first_rollouts(one) == first_rollouts(two)
    expected, found = (_sorted_ratios(out) for out in (one, two))
    assert len(expected) == len(found) == 32
    assert found == pytest.approx(expected, abs=1e-4)
    assert [event["sync/verified"] for event in real_jobs.events(two, "iteration")] == [1]


def _sorted_ratios(out: Path) -> list[Any]:
    return sorted(real_jobs.events(out, "iteration")[0]["mismatch/seq_log_ratios"])
