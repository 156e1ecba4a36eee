"""When the trainer dumps, and with which weights, on two real ranks."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from megatron_precision.config.schema import ParallelConfig, RunConfig, TrainConfig
from megatron_precision.layouts.hf_files import read_checkpoint
from megatron_precision.observe.dump import read_dump
from tests.distributed.cases import Case
from tests.distributed.harness import run_distributed
from tests.distributed.oracle import DENSE, checkpoint, random_batch, random_hf_model

K3 = 1e-5
# Iteration 5 jumps in mismatch, 6 in gradient norm, 7 in both, 8 again in one.
SERIES = [*[(K3, 1.0)] * 5, (9 * K3, 1.0), (K3, 7.0), (9 * K3, 8.0), (K3, 9.0)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dumps")
    config = RunConfig(
        recipe="test",
        precision="bf16",
        model=DENSE,
        parallel=ParallelConfig(2, 2),
        train=TrainConfig(dump_every=4, dump_jumps_at_most=3),
    )
    tensors = checkpoint(DENSE, random_hf_model(DENSE))
    case = Case(config, tensors, random_batch(DENSE, 6))
    small = dataclasses.replace(config.train, dump_weights_gib=0.0)
    light = dataclasses.replace(case, config=dataclasses.replace(config, train=small))
    cases = {out / "with": case, out / "without": light}
    run_distributed("replay_bodies.dumps", 2, cases, SERIES)
    return out


def reasons(run: Path) -> dict[int, tuple[str, ...]]:
    found = {int(path.name): read_dump(path) for path in (run / "dumps").iterdir()}
    return {number: found[number].header.reasons for number in sorted(found)}


def test_an_iteration_is_dumped_when_it_is_due_or_jumps(folder: Path) -> None:
    every, mismatch = "every 4 iterations", "mismatch/k3_kl 9e-05 is above 5 × its median 1e-05"
    assert reasons(folder / "with") == {
        0: (every,),
        4: (every,),
        5: (mismatch,),
        6: ("loss/grad_norm 7 is above 5 × its median 1",),
        7: (mismatch, "loss/grad_norm 8 is above 5 × its median 1"),
        8: (every,),  # the three jumps of a run have been written
    }


def test_the_weights_are_those_from_before_the_update(folder: Path) -> None:
    for number in (4, 7):
        found = read_dump(folder / "with" / "dumps" / f"{number:06d}")
        assert found.weights is not None
        values = {float(v) for t in read_checkpoint(found.weights).values() for v in t.unique()}
        assert values == {float(number)}


def test_a_model_over_the_limit_is_left_out(folder: Path) -> None:
    found = read_dump(folder / "without" / "dumps" / "000005")
    assert found.weights is None
    assert sorted(path.name for path in found.folder.iterdir()) == [
        "dump.json",
        "rollouts.safetensors",
    ]


def test_what_was_sampled_and_measured_is_written(folder: Path) -> None:
    found = read_dump(folder / "with" / "dumps" / "000005")
    batch = random_batch(DENSE, 6)
    arrays = found.arrays
    np.testing.assert_array_equal(arrays.tokens, batch.tokens.numpy())
    np.testing.assert_array_equal(arrays.rollout_logprobs, batch.rollout_logprobs.numpy())
    assert arrays.old_known.tolist() == [True, True, False, False, False, False]
    assert arrays.rewards.tolist() == [0, 1, 2, 3, 4, 5]
    assert arrays.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert arrays.truncated.tolist() == [False, True, False, False, False, False]
    assert set(arrays.weight_version.tolist()) == {7}
    assert (found.header.step, found.header.grad_norms) == (10, (1.0,))
    token = int(arrays.tokens[0, 0])
    assert found.text(token) == f"<{token}>"
