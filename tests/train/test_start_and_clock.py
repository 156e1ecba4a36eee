"""What names a start, when it is complete, and where an iteration's time goes."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import pytest

from megatron_precision.config.schema import (
    AlgorithmConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from megatron_precision.data.start import FACTS, read_facts, start_fingerprint, start_is_complete
from megatron_precision.train.recorder import PhaseClock

BASE = RunConfig("one")


@pytest.mark.parametrize(
    "changed",
    [
        dataclasses.replace(BASE, recipe="another"),
        dataclasses.replace(BASE, precision="bf16"),
        dataclasses.replace(BASE, algo=AlgorithmConfig("PPO")),
        dataclasses.replace(BASE, optimizer=OptimizerConfig(learning_rate=1.0)),
        dataclasses.replace(BASE, train=TrainConfig(iterations=1)),
    ],
)
def test_runs_that_differ_in_precision_or_training_share_a_start(changed: RunConfig) -> None:
    assert start_fingerprint(changed) == start_fingerprint(BASE)


@pytest.mark.parametrize(
    "changed",
    [
        dataclasses.replace(BASE, seed=43),
        dataclasses.replace(BASE, model=dataclasses.replace(BASE.model, hidden_size=256)),
        dataclasses.replace(BASE, task=dataclasses.replace(BASE.task, difficulty=3)),
        dataclasses.replace(BASE, warm_start=dataclasses.replace(BASE.warm_start, batch_size=8)),
        dataclasses.replace(
            BASE, perfectible=dataclasses.replace(BASE.perfectible, accuracy_low=0.1)
        ),
        dataclasses.replace(
            BASE, rollout=dataclasses.replace(BASE.rollout, max_response_tokens=50)
        ),
    ],
)
def test_anything_that_makes_a_start_names_another_one(changed: RunConfig) -> None:
    assert start_fingerprint(changed) != start_fingerprint(BASE)


def test_a_start_is_complete_when_its_facts_are_there(tmp_path: Path) -> None:
    assert not start_is_complete(tmp_path)
    (tmp_path / FACTS).write_text('{"accuracy": 0.5}', encoding="utf-8")
    assert start_is_complete(tmp_path)
    assert read_facts(tmp_path) == {"accuracy": 0.5}


def test_phases_and_the_rest_add_up_to_the_iteration(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = PhaseClock()
    with clock.phase("rollout"):
        now += 5
    with clock.phase("train"):
        now += 2
    with clock.phase("train"):
        now += 1
    clock.add("rollout", -2)
    clock.add("reward", 2)
    now += 4
    assert clock.metrics() == {
        "time/rollout_s": 3,
        "time/reward_s": 2,
        "time/train_s": 3,
        "time/other_s": 4,
        "time/iteration_s": 12,
    }


def test_a_phase_that_fails_is_still_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)
    clock = PhaseClock()

    def fail() -> None:
        nonlocal now
        with clock.phase("sync"):
            now += 3
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert clock.seconds("sync") == 3
