"""Sampling gives log-probs that are numbers, or an error that says whose are not."""

from __future__ import annotations

import math

import pytest

from megatron_precision.rollout.engine import Request, Rollout
from megatron_precision.rollout.sampling import NonFiniteLogprobError, Prompt, refuse_non_finite


def rollout(prompt: int, number: int, *logprobs: float) -> Rollout:
    tokens = tuple(range(len(logprobs)))
    return Rollout(Request(prompt, number, (1,), 0), tokens, logprobs, False, 0)


PROMPTS = [Prompt("sum-17", (1,)), Prompt("sum-23", (2,))]


def test_numbers_pass() -> None:
    refuse_non_finite(
        PROMPTS, [[rollout(0, 0, -1.0, -0.5)], [], [rollout(1, 0), rollout(1, 1, 0.0)]]
    )


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_no_number_is_named_with_its_request_and_rank(bad: float) -> None:
    by_rank = [[rollout(0, 0, -1.0)], [], [rollout(1, 3, -1.0, -2.0, bad, -1.0)]]
    with pytest.raises(NonFiniteLogprobError) as found:
        refuse_non_finite(PROMPTS, by_rank)
    line = f"rank 2: prompt sum-23, rollout 3: log-prob {bad} of token 2 of 4"
    assert line in str(found.value)
    assert "sum-17" not in str(found.value)


def test_of_many_the_first_ones_are_named() -> None:
    by_rank = [[rollout(0, number, math.nan) for number in range(25)]]
    with pytest.raises(NonFiniteLogprobError, match="25 rollouts") as found:
        refuse_non_finite(PROMPTS, by_rank)
    assert str(found.value).count("rank 0") == 10
    assert "and 15 more" in str(found.value)
