"""Typed overrides and the way of a configuration through JSON."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_precision.config import overrides
from megatron_precision.config.errors import UserError
from megatron_precision.config.schema import RunConfig, to_dict


@pytest.fixture
def config() -> RunConfig:
    return RunConfig(recipe="a.recipe")


@pytest.mark.parametrize(
    ("override", "path", "expected"),
    [
        ("train.iterations=40", ("train", "iterations"), 40),
        ("train.iterations=2**4", ("train", "iterations"), 16),
        ("loss_scale.initial_scale=2**16", ("loss_scale", "initial_scale"), 65536.0),
        ("optimizer.eps=2**-1", ("optimizer", "eps"), 0.5),
        ("optimizer.learning_rate=1e-6", ("optimizer", "learning_rate"), 0.000001),
        ("optimizer.learning_rate=3", ("optimizer", "learning_rate"), 3.0),
        ("sinks.tensorboard=true", ("sinks", "tensorboard"), True),
        ("sinks.tensorboard=False", ("sinks", "tensorboard"), False),
        ("sinks.wandb=offline", ("sinks", "wandb"), "offline"),
        ("algo.name=PPO", ("algo", "name"), "PPO"),
    ],
)
def test_a_value_gets_the_type_of_its_field(
    config: RunConfig, override: str, path: tuple[str, str], expected: object
) -> None:
    value = getattr(getattr(overrides.apply(config, [override]), path[0]), path[1])
    assert value == expected
    assert type(value) is type(expected)


def test_only_the_named_fields_change(config: RunConfig) -> None:
    changed = to_dict(overrides.apply(config, ["train.iterations=41", "precision=bf16"]))
    expected = to_dict(config)
    expected["train"]["iterations"] = 41
    expected["precision"] = "bf16"
    assert changed == expected


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("train.iterations=4.5", "an integer"),
        ("train.iterations=four", "an integer"),
        ("train.iterations=true", "an integer"),
        ("train.iterations=2**-1", "an integer"),
        ("train.iterations=", "an integer"),
        ("optimizer.eps=nan", "a finite number"),
        ("optimizer.eps=inf", "a finite number"),
        ("optimizer.eps=10**400", "a finite number"),
        ("sinks.tensorboard=yes", "true or false"),
        ("sinks.wandb=on", "one of off, offline, online"),
    ],
)
def test_a_value_of_another_type_is_refused(
    config: RunConfig, override: str, expected: str
) -> None:
    with pytest.raises(UserError) as caught:
        overrides.apply(config, [override])
    (problem,) = caught.value.problems
    assert expected in problem.expected


@pytest.mark.parametrize(
    ("path", "hint"),
    [
        ("trian.iterations", "train.iterations"),
        ("train.iteratons", "train.iterations"),
        ("iterations", "train.iterations"),
        ("TRAIN.ITERATIONS", "train.iterations"),
        ("optimizer.clip_low", "algo.clip_low"),
        ("train", "its fields are train.iterations"),
        ("recipe", "the first argument"),
    ],
)
def test_an_unknown_path_is_answered_with_the_nearest(
    config: RunConfig, path: str, hint: str
) -> None:
    with pytest.raises(UserError) as caught:
        overrides.apply(config, [f"{path}=1"])
    (problem,) = caught.value.problems
    assert hint in problem.remedy


def test_all_mistakes_are_listed_at_once(config: RunConfig) -> None:
    wrong = ["train.iterations=x", "nothing.at_all=1", "seed", "seed=1", "seed=2"]
    with pytest.raises(UserError) as caught:
        overrides.apply(config, wrong)
    assert len(caught.value.problems) == 4
    assert str(caught.value).startswith("error: 4 problems")


def test_a_configuration_survives_json(config: RunConfig) -> None:
    changed = overrides.apply(config, ["loss_scale.initial_scale=2**15", "sinks.wandb=offline"])
    assert overrides.config_from_dict(json.loads(json.dumps(to_dict(changed)))) == changed


def test_a_dict_with_unknown_missing_and_mistyped_keys_is_refused_with_all_of_them(
    config: RunConfig,
) -> None:
    values = to_dict(config)
    values["train"]["iteration"] = values["train"].pop("iterations")
    values["seed"] = True
    values["model"]["rope_theta"] = "10000"
    del values["eval"]
    values["sinks"] = None
    with pytest.raises(UserError) as caught:
        overrides.config_from_dict(values)
    found = {(problem.what, problem.where) for problem in caught.value.problems}
    assert found == {
        ("unknown key", "train"),
        ("missing key", "train.iterations"),
        ("wrong value", "seed"),
        ("wrong value", "model.rope_theta"),
        ("missing key", "eval"),
        ("not an object", "sinks"),
    }


def test_a_configuration_file_that_is_no_json_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    with pytest.raises(UserError, match="cannot read"):
        overrides.config_from_file(path)
    path.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match="not JSON"):
        overrides.config_from_file(path)


def test_every_field_of_the_configuration_can_be_overridden(config: RunConfig) -> None:
    def leaves(values: dict[str, object], prefix: str = "") -> set[str]:
        found: set[str] = set()
        for name, value in values.items():
            path = prefix + name
            found |= leaves(value, path + ".") if isinstance(value, dict) else {path}
        return found

    assert set(overrides.paths()) == leaves(dataclasses.asdict(config)) - {"recipe"}


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("rollout.top_p=0.9", "falsifies the mismatch"),
        ("rollout.top_k=50", "falsifies the mismatch"),
        ("rollout.repetition_penalty=1.1", "falsifies the mismatch"),
        ("parallel.cp_size=2", "context parallelism is not supported"),
    ],
)
def test_what_would_falsify_the_log_probs_is_no_setting_and_the_message_says_why(
    override: str, reason: str
) -> None:
    with pytest.raises(UserError) as caught:
        overrides.apply(RunConfig("one"), [override])
    (problem,) = caught.value.problems
    assert problem.where == override.partition("=")[0]
    assert reason in problem.remedy


def test_a_configuration_that_an_earlier_version_wrote_is_read() -> None:
    """It has the settings that are none now, at the only values that they could have."""
    config = RunConfig("one")
    values = to_dict(config)
    values["rollout"] |= {"top_p": 1.0, "top_k": -1, "repetition_penalty": 1.0}
    values["parallel"]["cp_size"] = 1
    assert overrides.config_from_dict(values) == config
    values["rollout"]["top_k"] = 50
    with pytest.raises(UserError, match=r"rollout\.top_k"):
        overrides.config_from_dict(values)


def test_every_bound_stands_at_its_field() -> None:
    found = overrides.bounds()
    assert found["train.iterations"].allow(0)
    assert not found["parallel.tp_size"].allow(0)
    assert found["train.dump_jump_factor"].allow(0)
    assert not found["train.dump_jump_factor"].allow(1)
    assert not found["eval.top_p"].allow(1.1)
    assert "precision" not in found
