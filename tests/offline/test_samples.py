"""Files between the parts: what is written is read, and other settings are not taken for these."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from megatron_precision.offline.samples import (
    Samples,
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
    write_scores(path, np.array([-0.5]), {"tokens": 1}, "three")
    logprobs, facts = read_scores(path)
    assert (logprobs.tolist(), facts) == ([-0.5], {"tokens": 1})
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
