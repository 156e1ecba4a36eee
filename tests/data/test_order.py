"""The order of prompts, by its properties."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_precision.data.mixture import prompts_for_iteration

SIZES = st.integers(1, 23)
SEEDS = st.integers(0, 2**40)


@given(num=SIZES, per=st.integers(1, 31), epochs=st.integers(1, 4), seed=SEEDS)
def test_iterations_end_to_end_are_whole_epochs_however_they_are_cut(
    num: int, per: int, epochs: int, seed: int
) -> None:
    iterations = -(-epochs * num // per)
    laid_out = [p for i in range(iterations) for p in prompts_for_iteration(num, i, per, seed)]
    assert len(laid_out) == iterations * per
    for epoch in range(epochs):
        assert sorted(laid_out[epoch * num : (epoch + 1) * num]) == list(range(num))


@given(num=SIZES, iteration=st.integers(0, 10**6), per=st.integers(1, 31), seed=SEEDS)
def test_a_late_iteration_needs_no_earlier_one_and_is_as_long_as_asked(
    num: int, iteration: int, per: int, seed: int
) -> None:
    order = prompts_for_iteration(num, iteration, per, seed)
    assert order == prompts_for_iteration(num, iteration, per, seed)
    assert len(order) == per
    assert set(order) <= set(range(num))


@given(num=SIZES, iteration=st.integers(0, 50), per=st.integers(1, 31), seed=SEEDS)
def test_no_question_comes_more_often_in_an_iteration_than_epochs_it_touches(
    num: int, iteration: int, per: int, seed: int
) -> None:
    first, last = iteration * per, (iteration + 1) * per - 1
    counts = Counter(prompts_for_iteration(num, iteration, per, seed))
    assert max(counts.values()) <= last // num - first // num + 1


@given(num=st.integers(1, 60), per=st.integers(1, 20), seed=SEEDS)
def test_the_order_does_not_depend_on_how_many_an_iteration_takes(
    num: int, per: int, seed: int
) -> None:
    cut = [p for i in range(3) for p in prompts_for_iteration(num, i, per, seed)]
    assert cut == prompts_for_iteration(num, 0, 3 * per, seed)


def test_epochs_and_seeds_shuffle_otherwise() -> None:
    epochs = [tuple(prompts_for_iteration(50, epoch, 50, 1)) for epoch in range(4)]
    assert len({*epochs, tuple(prompts_for_iteration(50, 0, 50, 2)), tuple(range(50))}) == 6


def test_every_argument_out_of_range_is_listed() -> None:
    with pytest.raises(ValueError, match=r"num_questions: got 0.*iteration: got -1.*per_iter") as e:
        prompts_for_iteration(0, -1, 0, 3)
    assert "expected 1 or more" in str(e.value)


def test_another_stream_is_another_order() -> None:
    first, second = (prompts_for_iteration(50, 0, 50, 1, stream=name) for name in ("order", "b"))
    assert first != second
    assert sorted(first) == sorted(second)
    assert first == prompts_for_iteration(50, 0, 50, 1)
