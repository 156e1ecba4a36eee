"""Mixtures by their properties. Not covered: what a trainer does with the questions."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_precision.config.errors import UserError
from megatron_precision.data.mixture import Mixture, MixtureSet

SEEDS = st.integers(0, 2**40)
SETS = st.lists(st.tuples(st.integers(1, 9), st.floats(0.01, 100.0)), min_size=1, max_size=4).map(
    lambda parts: [MixtureSet(f"set{n}", size, w) for n, (size, w) in enumerate(parts)]
)
THREE = [MixtureSet("large", 50, 5.0), MixtureSet("middle", 11, 2.0), MixtureSet("small", 3, 1.0)]


@given(sets=SETS, cuts=st.lists(st.integers(0, 13), max_size=6), seed=SEEDS)
def test_the_order_does_not_depend_on_how_it_is_cut_or_how_often_it_is_resumed(
    sets: list[MixtureSet], cuts: list[int], seed: int
) -> None:
    whole = Mixture(sets, seed).take(sum(cuts))
    pieces, state = [], Mixture(sets, seed).state()
    for cut in cuts:
        resumed = Mixture(sets, seed)
        resumed.restore(json.loads(json.dumps(state)))
        pieces += resumed.take(cut)
        state = resumed.state()
    assert pieces == whole


@given(sets=SETS, epochs=st.integers(1, 3), seed=SEEDS)
def test_every_question_of_a_set_comes_once_an_epoch_of_it(
    sets: list[MixtureSet], epochs: int, seed: int
) -> None:
    taken = Mixture(sets, seed).take(60 * epochs)
    for part in sets:
        indices = [index for name, index in taken if name == part.name]
        for begin in range(0, len(indices) - part.num_prompts + 1, part.num_prompts):
            epoch = indices[begin : begin + part.num_prompts]
            assert sorted(epoch) == list(range(part.num_prompts))


@given(sets=SETS, seed=SEEDS)
def test_at_every_moment_each_set_has_given_its_share(sets: list[MixtureSet], seed: int) -> None:
    total = sum(Fraction(part.weight) for part in sets)
    counts = Counter[str]()
    for place, (name, _) in enumerate(Mixture(sets, seed).take(150), start=1):
        counts[name] += 1
        for part in sets:
            due = place * Fraction(part.weight) / total
            # Of two sets none is ever a whole question off; of four the bound is wider.
            assert abs(counts[part.name] - due) < (1 if len(sets) <= 2 else 2)


def test_shares_are_exact_where_they_come_out_even() -> None:
    counts = Counter(name for name, _ in Mixture(THREE, 7).take(80))
    assert counts == {"large": 50, "middle": 20, "small": 10}


def test_seeds_names_and_epochs_shuffle_otherwise() -> None:
    def order(name: str, seed: int, first: int = 0) -> tuple[int, ...]:
        mixture = Mixture([MixtureSet(name, 40)], seed)
        mixture.take(first)
        return tuple(index for _, index in mixture.take(40))

    orders = {order("a", 1), order("a", 2), order("b", 1), order("a", 1, 40), tuple(range(40))}
    assert len(orders) == 5


def test_another_process_has_the_same_order() -> None:
    code = (
        "from megatron_precision.data.mixture import *\n"
        "print(Mixture([MixtureSet('a', 7, 0.3), MixtureSet('b', 5, 0.7)], 3).take(30))"
    )
    here = Mixture([MixtureSet("a", 7, 0.3), MixtureSet("b", 5, 0.7)], 3).take(30)
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == str(here)


@pytest.mark.parametrize(
    "other",
    [
        Mixture(THREE, 8),
        Mixture(THREE[:2], 7),
        Mixture([*THREE[:2], MixtureSet("small", 4, 1.0)], 7),
        Mixture([*THREE[:2], MixtureSet("small", 3, 2.0)], 7),
    ],
)
def test_the_state_of_another_mixture_is_refused(other: Mixture) -> None:
    state = Mixture(THREE, 7).state()
    with pytest.raises(UserError, match="that of another mixture"):
        other.restore(state)


def test_every_set_that_cannot_take_part_is_listed() -> None:
    sets = [
        MixtureSet("a", 0),
        MixtureSet("b", 3, 0.0),
        MixtureSet("b", 3, float("nan")),
        MixtureSet("c", 3, float("inf")),
    ]
    with pytest.raises(UserError) as caught:
        Mixture(sets, 1)
    kinds = Counter(problem.what for problem in caught.value.problems)
    assert kinds == {
        "an empty set": 1,
        "a weight that gives no share": 3,
        "a set that is named more than once": 1,
    }
    with pytest.raises(UserError, match="a mixture of nothing"):
        Mixture([], 1)
    with pytest.raises(ValueError, match="got -1"):
        Mixture(THREE, 1).take(-1)
