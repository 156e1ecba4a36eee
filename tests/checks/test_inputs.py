"""What a run reads, refused before anything is started: all of it at once, by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

import recipes
from megatron_precision.checks import inputs
from megatron_precision.config.errors import UserError
from megatron_precision.config.schema import RunConfig, StartConfig, TaskConfig
from megatron_precision.layouts.hf_config import hf_config

ROW = {
    "prompt": [{"role": "user", "content": "1+1"}],
    "reward_model": {"ground_truth": "2"},
}


@pytest.fixture
def config(tmp_path: Path) -> RunConfig:
    base = recipes.build("sanity.tiny_dense")
    (tmp_path / "config.json").write_text(json.dumps(hf_config(base.model, "bfloat16")))
    (tmp_path / "model.safetensors").touch()
    (tmp_path / "a.jsonl").write_text(json.dumps(ROW))
    task = TaskConfig("chat", train_sets=(f"a={tmp_path / 'a.jsonl'}",))
    start = StartConfig("checkpoint", str(tmp_path), "Someone/Some-Model")
    return dataclasses.replace(base, task=task, start=start)


def test_a_checkpoint_and_files_that_fit_are_accepted(config: RunConfig) -> None:
    assert inputs.input_problems(config) == []


def test_a_warm_start_needs_nothing() -> None:
    assert inputs.input_problems(recipes.build("sanity.tiny_dense")) == []


def test_everything_that_is_missing_is_reported_at_once(config: RunConfig, tmp_path: Path) -> None:
    task = TaskConfig("chat", eval_sets=(f"b={tmp_path / 'b.jsonl'}",), scorer="no.such:scorer")
    empty = dataclasses.replace(
        config, task=task, start=dataclasses.replace(config.start, checkpoint="")
    )
    with pytest.raises(UserError) as raised:
        inputs.check(empty)
    where = [problem.where for problem in raised.value.problems]
    expected = ["start.checkpoint", "task.train_sets", str(tmp_path / "b.jsonl"), "task.scorer"]
    assert where == expected
    assert "Someone/Some-Model" in str(raised.value)


def test_a_checkpoint_without_weights_and_one_without_a_shard_are_named(
    config: RunConfig, tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").unlink()
    assert [problem.what for problem in inputs.input_problems(config)] == ["no weights"]
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors", "c": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "1.safetensors").touch()
    (found,) = inputs.input_problems(config)
    assert (found.what, found.where) == ("a shard is missing", str(tmp_path / "2.safetensors"))


def test_an_evaluation_alone_needs_no_prompts_to_train_on(config: RunConfig) -> None:
    alone = dataclasses.replace(config, task=TaskConfig("chat"))
    assert inputs.input_problems(alone, training=False) == []


def test_a_checkpoint_of_another_model_is_named_field_by_field(config: RunConfig) -> None:
    other = dataclasses.replace(config.model, hidden_size=64, rope_theta=1e6)
    found = inputs.input_problems(dataclasses.replace(config, model=other))
    assert [(p.where.rpartition("model.")[2], p.got, p.expected) for p in found] == [
        ("hidden_size", "128", "64"),
        ("rope_theta", "500.0", "1000000.0"),
    ]
    assert found[0].remedy.startswith("--set model.hidden_size=128")


def test_another_checkpoint_brings_its_model_along(config: RunConfig, tmp_path: Path) -> None:
    base = recipes.build("sanity.tiny_moe")
    changed = inputs.with_checkpoint(base, str(tmp_path))
    assert changed.model.model_type == "qwen3"
    assert (changed.start.kind, changed.task.name) == ("checkpoint", "chat")
    assert changed.optimizer == base.optimizer
