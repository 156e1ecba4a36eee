"""The last number of a response, by hand."""

from __future__ import annotations

import pytest

from megatron_precision.rewards.scorers import score_number, scorer


@pytest.mark.parametrize(
    ("response", "answer", "right"),
    [
        ("42", "42", 1.0),
        ("17 + 25 = 42.", "42", 1.0),
        ("First 7, then **42**!", "42", 1.0),
        ("it is 42, and not 41", "42", 0.0),
        ("there is none", "42", 0.0),
        ("", "42", 0.0),
        ("-3", "3", 0.0),
        ("5 - 8 = -3", "-3", 1.0),
        ("12-5=7, so 12-5", "5", 1.0),
        ("(1+2)-3", "3", 1.0),
        ("-(-3)", "-3", 1.0),
        ("1,234,567 apples", "1234567", 1.0),
        ("7,5", "5", 1.0),  # no group of three: a list
        ("1,2345", "2345", 1.0),
        ("3.50 dollars", "3.5", 1.0),
        ("3.", "3", 1.0),
        ("007", "7", 1.0),
        ("٤٢", "42", 0.0),
        ("9" * 5000, "9" * 5000, 1.0),
        ("9" * 5000, "1", 0.0),
    ],
)
def test_the_last_number_counts(response: str, answer: str, right: float) -> None:
    assert score_number(response, answer) == right


def test_a_right_answer_that_is_no_number_is_a_mistake_of_ours() -> None:
    with pytest.raises(ValueError, match="is not a number: 'x=3'"):
        score_number("3", "x=3")


def test_it_is_found_by_its_name() -> None:
    assert scorer("number") is score_number
