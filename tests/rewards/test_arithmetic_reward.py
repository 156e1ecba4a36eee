"""The reward of an arithmetic question, case by case."""

from __future__ import annotations

import pytest

from megatron_precision.config.schema import TaskConfig
from megatron_precision.data.arithmetic import make_questions
from megatron_precision.rewards.scorers import score_arithmetic


@pytest.mark.parametrize("response", ["b7+8=15,c15+3=18", "c3+15=18", "=18"])
def test_the_right_final_answer_scores_one(response: str) -> None:
    assert score_arithmetic(response, "18", truncated=False) == 1.0


@pytest.mark.parametrize("response", ["b7+8=99,c99+3=18", "b1+1=3,=18", "nonsense=18"])
def test_steps_are_not_graded(response: str) -> None:
    assert score_arithmetic(response, "18", truncated=False) == 1.0


@pytest.mark.parametrize(
    "response",
    [
        "",
        "=",
        "18",
        "b7+8=15",
        "b7+8=15,c15+3=19",
        "c15+3=18,",
        "c15+3=18 ",
        "c15+3=18\n",
        "c15+3=18=",
        "c15+3=18,d18+1=19",
        "18=c15+3",
        "c15+3=118",
        "c15+3=180",
        "c15+3=018",
        "c15+3=+18",
        "c15+3=-18",
        "c15+3=1 8",
        "c15+3=18.0",
        "c15+3=18<eos>",
        "c15+3=١٨",
        "c15+3=１８",
    ],
)
def test_anything_but_the_right_number_at_the_very_end_scores_zero(response: str) -> None:
    assert score_arithmetic(response, "18", truncated=False) == 0.0


def test_a_truncated_response_scores_zero_even_if_it_ends_in_the_answer() -> None:
    assert score_arithmetic("b7+8=15,c15+3=18", "18", truncated=True) == 0.0


def test_zero_is_an_answer_but_not_a_prefix_of_one() -> None:
    assert score_arithmetic("b0+0=0", "0", truncated=False) == 1.0
    assert score_arithmetic("b0+0=00", "0", truncated=False) == 0.0


def test_a_generated_solution_scores_one_and_loses_it_with_any_other_answer() -> None:
    for question in make_questions(TaskConfig(difficulty=5), split="eval", count=50, seed=4):
        assert score_arithmetic(question.solution, question.answer, truncated=False) == 1.0
        other = str(int(question.answer) + 10)
        assert score_arithmetic(question.solution, other, truncated=False) == 0.0
