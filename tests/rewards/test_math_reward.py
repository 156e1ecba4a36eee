"""Math answers, with right and wrong decided by hand or by Python's own fractions."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from megatron_precision.rewards import math
from megatron_precision.rewards.isolation import Sample, ScorerPool
from megatron_precision.rewards.math import last_box, score

RIGHT = [
    ("045", "45"),
    ("12345", "12,345"),
    ("-7", "-7"),
    ("1000000", "10^6"),
    ("\\frac12", "\\frac{1}{2}"),
    ("\\frac{1}{2}", "0.5"),
    ("\\frac{1}{2}", "1/2"),
    ("\\dfrac{7}{3}", "2\\frac{1}{3}"),
    ("2\\sqrt{3}", "\\sqrt{12}"),
    ("\\{1, 2, 5\\}", "\\{5, 1, 2\\}"),
    ("(2, -3)", "\\left(2,-3\\right)"),
    ("(-\\infty, 1) \\cup (2, 3]", "(2,3]\\cup(-\\infty,1)"),
    (
        "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}",
        "\\begin{bmatrix}1&2\\\\3&4\\end{bmatrix}",
    ),
    ("x^2+2x+1", "(x+1)^2"),
    ("5", "x = 5"),
    ("16", "16\\text{ square inches}"),
    ("16\\text{ cm}", "16"),
    ("90^\\circ", "90"),
    ("\\$18", "18"),
    ("25_8", "25_{8}"),
    ("25_8", "25"),
    ("\\text{east}", "\\text{East}"),
    ("\\text{(C)}", "C"),
    ("$\\frac34$", "0.75"),
    ("\\boxed{3}", "3"),
]
WRONG = [
    ("45", "54"),
    ("-7", "7"),
    ("\\frac12", "\\frac{2}{1}"),
    ("\\frac{1}{3}", "0.33"),
    ("2\\pi", "6.28"),
    ("\\{1, 2\\}", "\\{1, 2, 3\\}"),
    ("(1, 2)", "(2, 1)"),
    ("[0, 1)", "[0, 1]"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix} 2 \\\\ 1 \\end{pmatrix}"),
    ("x + 1", "x - 1"),
    ("p - q", "q - p"),
    ("3", "3 \\text{ or } 4"),
    ("1234", "1, 2, 3, 4"),
    ("25_8", "25_7"),
    ("25_8", "21"),
    ("\\text{east}", "\\text{west}"),
    ("C", "D"),
    ("5", "\\text{five hundred}"),
    ("5", "\\frac{5}{0}"),
    ("5", ""),
    ("5", "\\unknown{"),
]


@pytest.mark.parametrize(("answer", "given"), RIGHT)
def test_the_right_value_scores_one_however_it_is_written(answer: str, given: str) -> None:
    assert score(f"With $x=2$ we are done: $\\boxed{{{given}}}$.", answer) == 1.0


@pytest.mark.parametrize(("answer", "given"), WRONG)
def test_another_value_scores_zero(answer: str, given: str) -> None:
    assert score(f"With $x=2$ we are done: $\\boxed{{{given}}}$.", answer) == 0.0


FRACTIONS = st.builds(Fraction, st.integers(-99, 99), st.integers(1, 99))


@settings(max_examples=40, deadline=None)
@given(value=FRACTIONS, other=FRACTIONS, factor=st.integers(1, 12))
def test_fractions_are_compared_by_value(value: Fraction, other: Fraction, factor: int) -> None:
    assume(value != other)
    expanded = f"\\frac{{{value.numerator * factor}}}{{{value.denominator * factor}}}"
    answer = f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
    assert score(f"\\boxed{{{expanded}}}", answer) == 1.0
    different = f"\\frac{{{other.numerator}}}{{{other.denominator}}}"
    assert score(f"\\boxed{{{different}}}", answer) == 0.0


@settings(max_examples=8, deadline=None)
@given(members=st.sets(st.integers(-50, 50), min_size=2, max_size=5), seed=st.integers(0, 99))
def test_sets_have_no_order_and_lose_no_member(members: set[int], seed: int) -> None:
    def written(numbers: list[int]) -> str:
        return "\\{" + ", ".join(map(str, numbers)) + "\\}"

    shuffled = sorted(members)
    random.Random(seed).shuffle(shuffled)
    answer = written(sorted(members))
    assert score(f"\\boxed{{{written(shuffled)}}}", answer) == 1.0
    assert score(f"\\boxed{{{written([*shuffled, 51])}}}", answer) == 0.0
    assert score(f"\\boxed{{{written([*shuffled[1:], 51])}}}", answer) == 0.0


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("first \\boxed{7}, no: \\boxed{5}", 1.0),
        ("first \\boxed{5}, no: \\boxed{7}", 0.0),
        ("\\boxed{5} or \\boxed{6} or \\boxed{7}", 0.0),
        ("\\boxed{\\boxed{5}}", 1.0),
        ("\\boxed{5} and then it was cut \\boxed{", 0.0),
        ("\\boxed{5", 0.0),
        ("\\boxed{}", 0.0),
        ("\\fbox{5}", 1.0),
        ("\\boxed {5}", 1.0),
        ("The final answer is $5$. I hope it is correct.", 0.0),
        ("5", 0.0),
        ("", 0.0),
    ],
)
def test_the_last_box_is_the_answer(response: str, reward: float) -> None:
    assert score(response, "5") == reward


def test_a_box_may_hold_braces_and_escaped_ones() -> None:
    assert last_box("a \\boxed{\\{1, \\frac{1}{2}\\}} b}") == "\\{1, \\frac{1}{2}\\}"
    assert last_box("\\boxed{\\left\\{ x \\right.} and }") == "\\left\\{ x \\right."
    assert last_box("\\boxed{a \\\\} b}") == "a \\\\"
    assert last_box("boxed{5}") is None


@pytest.mark.parametrize("answer", ["", "   ", "\\boxed{}"])
def test_a_right_answer_without_a_value_is_an_error(answer: str) -> None:
    with pytest.raises(ValueError, match="has no value"):
        score("\\boxed{5}", answer)


HOSTILE = {
    "tower of powers": "9^{9^{9^{9}}}",
    "tower of stars": "9**9**9**9",
    "factorial": "99999999999!",
    "brackets": "(" * 3000 + "1" + ")" * 3000,
    "digits": "9" * 5_000_000,
    "open boxes": "\\boxed{" * 200_000,
}


def test_hostile_answers_cost_their_reward_and_every_other_is_graded() -> None:
    samples = []
    for name, hostile in HOSTILE.items():
        samples.append(Sample(name, f"\\boxed{{{hostile}}}", "\\frac12"))
        samples.append(Sample(f"right after {name}", "\\boxed{0.5}", "\\frac12"))
    samples.append(
        Sample("right answer after a long text", "x" * 20_000_000 + "\\boxed{0.5}", ".5")
    )
    with ScorerPool(math.score, workers=2, time_limit_s=4.0) as pool:
        verdicts = pool.score(samples)
    for verdict in verdicts:
        wanted = 1.0 if verdict.sample.name.startswith("right") else 0.0
        assert verdict.reward == wanted, verdict.report()[-600:]
        assert verdict.status != "raised"
    # It must be stopped from outside: inside, the grader's own alarm would wait for the product.
    by_name = {verdict.sample.name: verdict.status for verdict in verdicts}
    assert by_name["tower of powers"] in ("timed_out", "out_of_memory")
