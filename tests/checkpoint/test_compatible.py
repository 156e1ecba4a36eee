"""What a resume may change, what it refuses, and when it is bit for bit the same run."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import recipes
from megatron_precision.checkpoint import compatible
from megatron_precision.config.schema import RunConfig, to_dict
from megatron_precision.observe.metrics import MetricsWriter

VERSIONS = {"torch": "2.13.0"}


def config(*overrides: str, precision: str = "fp16") -> RunConfig:
    return recipes.build("sanity.tiny_dense", precision, overrides=list(overrides))


def saved() -> dict[str, Any]:
    return {
        "version": compatible.VERSION,
        "config": json.loads(json.dumps(to_dict(config()))),
        "versions": VERSIONS,
    }


def refused(*overrides: str, precision: str = "fp16") -> list[str]:
    changed = config(*overrides, precision=precision)
    return [problem.where for problem in compatible.state_problems(changed, saved(), "000003")]


def test_the_same_configuration_resumes_bit_for_bit() -> None:
    assert refused() == []
    assert compatible.not_identical(config(), saved(), VERSIONS) == []


@pytest.mark.parametrize(
    "override",
    ["train.iterations=99", "checkpoint.every=7", "checkpoint.keep=9", "sinks.tensorboard=true",
     "eval.every=3", "train.dump_every=2"],
)  # fmt: skip
def test_how_long_and_who_watches_may_change(override: str) -> None:
    assert refused(override) == []
    assert compatible.not_identical(config(override), saved(), VERSIONS) == []


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["parallel.tp_size=1"], "the trainer's layout (parallel.tp_size 2 → 1)"),
        (["parallel.rollout_tp_size=1"], "the engine's layout (parallel.rollout_tp_size 2 → 1)"),
        (["train.micro_batch_size=3"], "the micro-batches (train.micro_batch_size 64 → 3)"),
        (["rollout.max_num_seqs=3"], "the engine's batches (rollout.max_num_seqs 512 → 3)"),
    ],
)
def test_what_adds_up_in_another_order_may_change_and_is_said(
    overrides: list[str], said: str
) -> None:
    assert refused(*overrides) == []
    lines = compatible.not_identical(config(*overrides), saved(), VERSIONS)
    assert any(said.split(" (")[0] in line for line in lines)


def test_another_number_of_ranks_starts_their_generators_anew() -> None:
    changed = config()
    layout = dataclasses.replace(changed.parallel, world_size=4)
    lines = compatible.not_identical(
        dataclasses.replace(changed, parallel=layout), saved(), VERSIONS
    )
    assert any("random generators" in line for line in lines)


def test_other_versions_are_said() -> None:
    assert compatible.not_identical(config(), saved(), {"torch": "2.14.0"}) == [
        "torch 2.13.0 → 2.14.0"
    ]


def test_everything_that_would_make_another_run_is_refused_at_once() -> None:
    found = refused(
        "seed=7", "optimizer.learning_rate=1e-3", "model.hidden_size=64", "algo.clip_low=0.1",
        "train.prompts_per_iteration=128", "rollout.temperature=0.5", "train.iterations=3",
        "kernels.fp32_lm_head=true",
        precision="bf16",
    )  # fmt: skip
    assert set(found) == {
        "precision", "seed", "optimizer.learning_rate", "model.hidden_size", "algo.clip_low",
        "train.prompts_per_iteration", "rollout.temperature", "kernels.fp32_lm_head",
    }  # fmt: skip


def test_a_field_that_the_checkpoint_does_not_know_is_no_change() -> None:
    older = saved()
    del older["config"]["checkpoint"], older["config"]["optimizer"]["clip_grad"]
    assert compatible.state_problems(config(), older, "000003") == []


@pytest.mark.parametrize(
    ("variables", "restarted"),
    [
        ({}, False),
        ({"SLURM_RESTART_COUNT": "0"}, False),
        ({"SLURM_RESTART_COUNT": "1"}, True),
        ({"TORCHELASTIC_RESTART_COUNT": "2"}, True),
        ({"SLURM_RESTART_COUNT": "", "TORCHELASTIC_RESTART_COUNT": "0"}, False),
    ],
)
def test_a_restarted_job_knows_it(
    variables: dict[str, str], restarted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert compatible.was_restarted() == restarted


def test_a_run_is_complete_when_it_ended_well_after_all_iterations(tmp_path: Path) -> None:
    three = config("train.iterations=3")
    assert not compatible.is_complete(three, tmp_path)
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        for number in range(3):
            writer.write("iteration", iteration=number, step=number, values={})
        assert not compatible.is_complete(three, tmp_path)
        writer.write("end", iteration=3, step=3, values={"status": "completed", "error": ""})
    assert not compatible.is_complete(three, tmp_path)  # no checkpoint of the end
    folder = tmp_path / "checkpoints" / "000003"
    folder.mkdir(parents=True)
    (folder / "trainer.json").write_text('{"iteration": 3}', encoding="utf-8")
    assert compatible.is_complete(three, tmp_path)
    assert not compatible.is_complete(config("train.iterations=4"), tmp_path)
