"""pass@k by counting every draw."""

from __future__ import annotations

import itertools
import math

import pytest

from megatron_precision.train.evaluation import pass_at_k, powers_of_two


@pytest.mark.parametrize("samples", [1, 2, 5])
def test_pass_at_k_is_the_share_of_draws_that_hold_a_right_answer(samples: int) -> None:
    for right, k in itertools.product(range(samples + 1), range(1, samples + 1)):
        draws = list(itertools.combinations([1] * right + [0] * (samples - right), k))
        assert pass_at_k(samples, right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_one_is_the_accuracy_and_pass_at_all_asks_for_any() -> None:
    assert pass_at_k(32, 8, 1) == 0.25
    assert [pass_at_k(32, right, 32) for right in (0, 1, 32)] == [0.0, 1.0, 1.0]
    assert math.isclose(pass_at_k(4, 1, 2), 0.5)


@pytest.mark.parametrize(("samples", "right", "k"), [(4, 5, 1), (4, -1, 1), (4, 1, 0), (4, 1, 5)])
def test_impossible_counts_are_refused(samples: int, right: int, k: int) -> None:
    with pytest.raises(ValueError, match="pass@"):
        pass_at_k(samples, right, k)


def test_the_ks_are_powers_of_two_up_to_the_samples() -> None:
    assert [powers_of_two(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 8]]
