"""Seeds and token digests: functions of what a request is for, not of where it ran."""

from __future__ import annotations

import itertools

from megatron_precision.rollout.engine import Request, Rollout, request_seed, token_hash


def test_seeds_differ_for_every_purpose_iteration_prompt_and_rollout() -> None:
    wanted = list(
        itertools.product(
            (0, 1, 42),
            ("train", "eval", "warm start"),
            range(6),
            ("q1", "q11", "q2", "1|q"),
            range(12),
        )
    )
    seeds = {request_seed(*what) for what in wanted}
    assert len(seeds) == len(wanted)
    assert all(0 <= seed < 2**62 for seed in seeds)


def test_a_seed_keeps_its_value_from_release_to_release() -> None:
    # From the definition, by hand: sha256("42|train|3|q7|5"), first 16 hex digits.
    assert request_seed(42, "train", 3, "q7", 5) == 0xE55A1160E9A38B9E >> 2


def rollout(prompt: int, number: int, tokens: tuple[int, ...], seed: int = 9) -> Rollout:
    return Rollout(Request(prompt, number, (1, 2), seed), tokens, (), False, 0)


def test_a_digest_does_not_depend_on_the_order_in_which_responses_finished() -> None:
    a, b, c = rollout(0, 0, (3,)), rollout(0, 1, (4, 5)), rollout(1, 0, (6,))
    assert token_hash([a, b, c]) == token_hash([c, a, b])


def test_a_digest_changes_with_any_token_and_with_the_request() -> None:
    base = [rollout(0, 0, (3, 4)), rollout(0, 1, (5,))]
    others = [
        [rollout(0, 0, (3, 5)), rollout(0, 1, (5,))],
        [rollout(0, 0, (3,)), rollout(0, 1, (4, 5))],
        [rollout(0, 0, (3, 4)), rollout(1, 0, (5,))],
        [rollout(0, 0, (3, 4), seed=8), rollout(0, 1, (5,))],
        base[:1],
    ]
    digests = [token_hash(base), *map(token_hash, others)]
    assert len(set(digests)) == len(digests)
