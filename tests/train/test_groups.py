"""Rounds of dynamic sampling with a made-up sampler: what is asked, kept and filled up."""

from __future__ import annotations

import pytest
import torch

from megatron_precision.rollout.engine import Request, Rollout
from megatron_precision.train.rollouts import RolloutGroups, sample_rounds

MIXED, RIGHT, WRONG = [1.0, 0.0], [1.0, 1.0], [0.0, 0.0]


class Script:
    """A sampler that hands out rounds written down beforehand; tokens say where they are from."""

    def __init__(self, *rounds: list[list[float]]) -> None:
        self._rounds = rounds
        self.asked: list[tuple[int, int]] = []

    def __call__(self, number: int, count: int) -> RolloutGroups:
        self.asked.append((number, count))
        rewards = self._rounds[number][:count]
        rollouts = [
            Rollout(Request(g, i, (7,), 0), (number, g, i)[: 1 + i + g], (), False, 0)
            for g in range(len(rewards))
            for i in range(2)
        ]
        return RolloutGroups(rollouts, torch.tensor(rewards), 0.5)


def test_with_no_further_round_the_batch_is_what_was_sampled() -> None:
    script = Script([RIGHT, MIXED, WRONG])
    everything, batch = sample_rounds(script, 3, extra_rounds=0)
    assert script.asked == [(0, 3)]
    assert batch.rollouts == everything.rollouts
    assert torch.equal(batch.rewards, torch.tensor([RIGHT, MIXED, WRONG]))


def test_a_full_batch_asks_for_nothing_more() -> None:
    script = Script([MIXED, MIXED])
    sample_rounds(script, 2, extra_rounds=5)
    assert script.asked == [(0, 2)]


def test_each_round_asks_as_many_as_are_missing_until_the_batch_is_full() -> None:
    script = Script([RIGHT, MIXED, WRONG, RIGHT], [WRONG, MIXED, MIXED], [MIXED], [MIXED])
    everything, batch = sample_rounds(script, 4, extra_rounds=5)
    assert script.asked == [(0, 4), (1, 3), (2, 1)]
    assert torch.equal(batch.rewards, torch.tensor([MIXED] * 4))
    assert len(everything.rewards) == 8
    assert everything.reward_s == 1.5
    # Group 1 of round 0, groups 1 and 2 of round 1, group 0 of round 2, two rollouts each.
    assert [r.tokens[:2] for r in batch.rollouts] == [
        (0, 1), (0, 1), (1, 1), (1, 1), (1, 2), (1, 2), (2,), (2, 0),
    ]  # fmt: skip
    assert [r.request.rollout for r in batch.rollouts] == [0, 1] * 4


def test_where_the_rounds_run_out_groups_without_contrast_keep_their_places() -> None:
    script = Script([RIGHT, MIXED, WRONG], [WRONG, RIGHT])
    everything, batch = sample_rounds(script, 3, extra_rounds=1)
    assert script.asked == [(0, 3), (1, 2)]
    assert torch.equal(batch.rewards, torch.tensor([RIGHT, MIXED, WRONG]))
    assert len(everything.rewards) == 5


@pytest.mark.parametrize("chosen", [[2, 0], [1]])
def test_chosen_groups_keep_rollouts_rewards_and_lengths_together(chosen: list[int]) -> None:
    sampled = Script([RIGHT, MIXED, WRONG])(0, 3)
    picked = sampled.groups(chosen)
    assert torch.equal(picked.rewards, sampled.rewards[chosen])
    assert torch.equal(picked.response_tokens, sampled.response_tokens[chosen])
    assert picked.rollouts == [sampled.rollouts[2 * g + i] for g in chosen for i in range(2)]
    assert sampled.response_tokens.tolist() == [[1, 2], [2, 3], [3, 3]]
