"""The format of a dump, and what the command says of one that cannot be replayed."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import recipes
from megatron_precision.cli import replay
from megatron_precision.cli.layouts import replay_layout
from megatron_precision.config.errors import UserError
from megatron_precision.config.schema import ParallelConfig, RunConfig, to_dict
from megatron_precision.observe import dump
from megatron_precision.replay import findings

MOE = recipes.recipe("sanity.tiny_moe")
DENSE = recipes.recipe("sanity.tiny_dense")


def arrays(**changed: Any) -> dump.Arrays:
    random = np.random.default_rng(5)
    values: dict[str, Any] = {
        "tokens": random.integers(0, 9, (3, 5)).astype("int32"),
        "response_mask": np.array([[0, 1, 1, 0, 0], [0, 0, 1, 1, 1], [0, 1, 0, 0, 0]], bool),
        "lengths": np.array([3, 5, 2], "int32"),
        "rollout_logprobs": random.normal(size=(3, 5)).astype("float32"),
        "old_logprobs": random.normal(size=(3, 5)).astype("float32"),
        "old_known": np.array([True, False, True]),
        "rewards": np.array([1, 0, 0], "float32"),
        "advantages": np.array([0.7, -0.7, 0], "float32"),
        "truncated": np.array([False, True, False]),
        "weight_version": np.array([4, 4, 4], "int32"),
        "group": np.array([0, 0, 1], "int32"),
    }
    return dump.Arrays(**{**values, **changed})


def write(folder: Path, config: RunConfig = DENSE, **changed: Any) -> Path:
    header = dump.Header(
        iteration=3, step=12, reasons=("every 3 iterations",), config=to_dict(config), platform={},
        versions={}, metrics={"mismatch/k3_kl": 1e-5}, grad_norms=(0.5, "nan"), weights="",
        texts={"1": "a"},
    )  # fmt: skip
    dump.write_arrays(folder, arrays(**changed))
    dump.write_header(folder, header)
    return folder


def read_problems(folder: Path) -> list[str]:
    with pytest.raises(UserError) as wrong:
        dump.read_dump(folder)
    return [problem.what for problem in wrong.value.problems]


@pytest.mark.parametrize("routed", [False, True])
def test_what_is_written_is_read(tmp_path: Path, routed: bool) -> None:
    experts = np.arange(3 * 5 * 2 * 2, dtype="int16").reshape(3, 5, 2, 2) if routed else None
    found = dump.read_dump(write(tmp_path / "000003", routed_experts=experts))
    wanted = arrays(routed_experts=experts)
    for part in dataclasses.fields(dump.Arrays):
        ours, theirs = getattr(wanted, part.name), getattr(found.arrays, part.name)
        if ours is None:
            assert theirs is None
        else:
            assert ours.dtype == theirs.dtype
            np.testing.assert_array_equal(ours, theirs)
    assert found.header.grad_norms == (0.5, "nan")
    assert (found.header.step, found.weights, found.text(1), found.text(2)) == (
        12,
        None,
        "a",
        "<2>",
    )


def test_a_dump_without_its_header_is_not_whole(tmp_path: Path) -> None:
    dump.write_arrays(tmp_path, arrays())
    assert read_problems(tmp_path) == ["not a whole dump"]


def test_what_is_missing_is_said_in_plain_words(tmp_path: Path) -> None:
    def got(folder: Path) -> list[str]:
        with pytest.raises(UserError) as raised:
            dump.read_dump(folder)
        return [problem.got for problem in raised.value.problems]

    assert got(tmp_path / "nothing") == ["no such folder"]
    assert got(tmp_path) == ["dump.json is not there"]
    folder = write(tmp_path)
    (folder / dump.ARRAYS).unlink()
    assert got(folder) == ["rollouts.safetensors is not there"]


def test_damage_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / dump.ARRAYS).write_bytes(b"no tensors")
    assert read_problems(folder) == ["not a whole dump"]
    header = json.loads((folder / dump.HEADER).read_text())
    write(folder)
    (folder / dump.HEADER).write_text(json.dumps({**header, "format": 2}))
    assert read_problems(folder) == ["a dump of another format"]
    (folder / dump.HEADER).write_text(json.dumps({**header, "extra": 2}))
    assert read_problems(folder) == ["other fields than a dump has"]


def test_an_array_of_another_shape_or_dtype_is_refused() -> None:
    with pytest.raises(ValueError, match=r"rewards: float64 \[3\] is not float32 \[3\]"):
        arrays(rewards=np.zeros(3))
    with pytest.raises(ValueError, match=r"old_logprobs: float32 \[3, 4\]"):
        arrays(old_logprobs=np.zeros((3, 4), "float32"))


def test_a_layout_is_read_as_it_is_written() -> None:
    assert replay_layout("tp=2,pp=2", DENSE) == ParallelConfig(4, 2, 2)
    assert replay_layout("dp=2,ep=2", MOE) == ParallelConfig(2, 1, 1, 2)
    assert replay_layout("tp=2", MOE).sequence_parallel  # Megatron asks for it
    assert not replay_layout("tp=2,sp=0", MOE).sequence_parallel
    for text in ("tp=1", "tp=2,pp=2", "tp=2,ep=2,sp=1"):
        assert findings.layout_words(replay_layout(text, DENSE)) == text


@pytest.mark.parametrize("text", ["tp", "tp=²", "tp=0", "tp=2,tp=2", "cp=2", "sp=2", "", "tp=-1"])
def test_what_is_no_layout_is_refused(text: str) -> None:
    with pytest.raises(UserError):
        replay_layout(text, DENSE)


def test_every_problem_of_a_replay_is_listed(tmp_path: Path) -> None:
    found = dump.read_dump(write(tmp_path))
    with pytest.raises(UserError) as wrong:
        replay.resolve(found, "fp16", "tp=3", None)
    whats = [problem.what for problem in wrong.value.problems]
    assert "the number of attention heads does not divide" in whats
    assert whats[-1] == "the dump holds no weights"


def test_another_model_than_the_dumps_is_refused(tmp_path: Path) -> None:
    from megatron_precision.layouts.hf_config import hf_config

    (tmp_path / "model.safetensors").touch()  # that there are weights is looked at, not which
    other = dataclasses.replace(DENSE.model, num_hidden_layers=3)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(other, "float32")))
    found = dump.read_dump(write(tmp_path / "dump"))
    with pytest.raises(UserError, match="another model"):
        replay.resolve(found, None, None, tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(hf_config(DENSE.model, "float32")))
    config, weights = replay.resolve(found, None, None, tmp_path)
    assert (config.precision, config.parallel.tp_size, weights) == ("fp16", 2, tmp_path)
