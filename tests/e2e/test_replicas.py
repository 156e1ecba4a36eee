"""What the sampler asks of two replicas, on two gloo processes, with an engine that is none.

That real replicas sample what one engine samples is shown by test_layouts.py.
"""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.e2e import real_jobs


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    out = tmp_path_factory.mktemp("replicas")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    body = str(Path(__file__).with_name("sampler_job.py"))
    jobs = [
        subprocess.Popen(
            [sys.executable, body, str(rank), str(port), str(out)], env=real_jobs.environment()
        )
        for rank in (0, 1)
    ]
    assert [job.wait(timeout=real_jobs.PATIENCE_S) for job in jobs] == [0, 0]
    return [json.loads((out / f"rank{rank}.json").read_text()) for rank in (0, 1)]


def test_every_rollout_is_asked_of_one_replica_alone(ranks: list[dict[str, Any]]) -> None:
    asked = [[tuple(pair) for pair in rank["asked"]] for rank in ranks]
    # Five prompts of three rollouts, dealt in turn.
    assert asked[0] == [(prompt, rollout) for prompt in (0, 2, 4) for rollout in range(3)]
    assert asked[1] == [(prompt, rollout) for prompt in (1, 3) for rollout in range(3)]


def test_both_replicas_get_all_rollouts_and_rewards_in_order(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["rollouts"] == ranks[1]["rollouts"]
    pairs = [tuple(rollout[:2]) for rollout in ranks[0]["rollouts"]]
    assert pairs == [(prompt, rollout) for prompt in range(5) for rollout in range(3)]
    expected = [float(prompt) for prompt in range(5) for _ in range(3)]
    assert ranks[0]["rewards"] == ranks[1]["rewards"] == expected


def test_a_response_is_graded_while_the_others_are_still_sampled(
    ranks: list[dict[str, Any]],
) -> None:
    # The engine finishes one a step. A sampler that waited for a grade would never end: there is
    # none before the last response.
    assert ranks[0]["still_sampled"] == [8, 7, 6, 5, 4, 3, 2, 1, 0]
    assert ranks[1]["still_sampled"] == [5, 4, 3, 2, 1, 0]


def test_no_rollout_repeats_another_even_of_a_question_that_comes_twice(
    ranks: list[dict[str, Any]],
) -> None:
    # The engine answers with the seed, of which 62 bits do not meet by chance.
    seeds = [rollout[2] for rollout in ranks[0]["rollouts"]]
    assert len(set(seeds)) == 15
