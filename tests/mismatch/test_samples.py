"""Files between the parts: what is written is read, and other settings are not taken for these."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np

from megatron_precision.mismatch.comparison import (
    Samples,
    Scores,
    is_made_from,
    read_samples,
    read_scores,
    write_samples,
    write_scores,
)

SAMPLES = Samples(
    prompts=[[5, 6], [7]],
    responses=[[1, 2, 3], []],
    rollout_logprobs=np.array([-0.5, -1.25, -3.0]),
    truncated=np.array([True, False]),
    facts={"tokens": 3, "platform": {"device": "x"}},
)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    assert not is_made_from(path, "one")
    write_samples(path, SAMPLES, "one")
    assert is_made_from(path, "one")
    assert not is_made_from(path, "two")
    found = read_samples(path)
    assert (found.prompts, found.responses, found.facts) == (
        SAMPLES.prompts, SAMPLES.responses, SAMPLES.facts,
    )  # fmt: skip
    assert found.rollout_logprobs.tolist() == SAMPLES.rollout_logprobs.tolist()
    assert found.truncated.tolist() == [True, False]
    assert found.lengths.tolist() == [3, 0]
    assert found.routed_experts is None
    write_scores(path, Scores(np.array([-0.5]), {"tokens": 1}), "three")
    scores = read_scores(path)
    assert (scores.train_logprobs.tolist(), scores.facts) == ([-0.5], {"tokens": 1})
    assert (scores.router_flips, scores.replayed_logprobs) == (None, None)
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_the_experts_of_each_response_are_read_back_apart(tmp_path: Path) -> None:
    # 2 + 3 and 1 + 0 tokens, of two layers and one expert each.
    experts = [np.arange(10, dtype=np.uint8).reshape(5, 2, 1), np.full((1, 2, 1), 255, np.uint8)]
    path = tmp_path / "a.npz"
    write_samples(path, dataclasses.replace(SAMPLES, routed_experts=experts), "one")
    found = read_samples(path).routed_experts
    assert found is not None
    assert [part.tolist() for part in found] == [part.tolist() for part in experts]
    flips, replayed = np.array([0, 2, 1]), np.array([-0.5, -1.0, -2.0])
    write_scores(path, Scores(np.array([-1.0, -1.5, -2.0]), {}, flips, replayed), "two")
    scores = read_scores(path)
    assert scores.router_flips is not None
    assert scores.replayed_logprobs is not None
    assert scores.router_flips.tolist() == flips.tolist()
    assert scores.replayed_logprobs.tolist() == replayed.tolist()
