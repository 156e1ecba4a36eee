"""Questions of the arithmetic task, checked by arithmetic of our own and by `eval`."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from dataclasses import FrozenInstanceError
from typing import get_args

import pytest

from megatron_precision.config.schema import TaskConfig
from megatron_precision.data.arithmetic import (
    CharTokenizer,
    Question,
    Split,
    make_questions,
    question_stream,
    split_of,
)

SPLITS: tuple[Split, ...] = get_args(Split)
TASK = TaskConfig(difficulty=7)


def questions(split: Split = "train", count: int = 200, seed: int = 5) -> list[Question]:
    return make_questions(TASK, split=split, count=count, seed=seed)


def test_the_answer_is_the_sum_of_the_terms_in_the_prompt() -> None:
    for question in questions():
        assert re.fullmatch("a[1-9]b[1-9]c[1-9]d[1-9]e[1-9]f[1-9]g[1-9]=", question.prompt)
        assert int(question.answer) == sum(int(c) for c in question.prompt if c.isdigit())


def test_every_step_is_true_adds_the_term_it_names_and_carries_the_total_on() -> None:
    for question in questions():
        terms = dict(re.findall("([a-z])([0-9])", question.prompt))
        total = int(terms.pop("a"))
        for (label, term), step in zip(terms.items(), question.solution.split(","), strict=True):
            assert step[0] == label
            addition, result = step[1:].split("=")
            assert eval(addition) == int(result)
            assert sorted(map(int, addition.split("+"))) == sorted([total, int(term)])
            total = int(result)
        assert question.solution.endswith("=" + question.answer)


def test_either_operand_stands_first_about_half_of_the_time() -> None:
    term_first = steps = 0
    for question in questions(count=400):
        terms = dict(re.findall("([a-z])([0-9])", question.prompt))
        for step in question.solution.split(","):
            left, right = re.findall("[0-9]+", step)[:2]
            if left != right:
                steps += 1
                term_first += left == terms[step[0]] and len(right) >= len(left)
    # The totals of the first step have one digit like the terms, so the count is not exact.
    assert 0.4 < term_first / steps < 0.6


def test_no_question_is_in_two_splits_whatever_the_seeds() -> None:
    drawn = {
        split: {
            q.prompt
            for seed in (0, 1)
            for q in make_questions(TaskConfig(difficulty=3), split=split, count=50, seed=seed)
        }
        for split in SPLITS
    }
    for one, other in itertools.combinations(SPLITS, 2):
        assert not drawn[one] & drawn[other]


def test_the_splits_share_all_questions_of_a_task_6_to_3_to_1() -> None:
    prompts = [
        "".join(f"{label}{term}" for label, term in zip("abcd", terms, strict=True)) + "="
        for terms in itertools.product(range(1, 10), repeat=4)
    ]
    found = [split_of(prompt) for prompt in prompts]
    shares = {split: found.count(split) / len(found) for split in SPLITS}
    assert shares == pytest.approx({"warm_start": 0.6, "train": 0.3, "eval": 0.1}, abs=0.02)


@pytest.mark.parametrize("split", SPLITS)
def test_questions_are_different_and_so_are_their_ids(split: Split) -> None:
    drawn = make_questions(TaskConfig(difficulty=3), split=split, count=40, seed=9)
    assert len({q.prompt for q in drawn}) == len({q.id for q in drawn}) == 40


def test_a_longer_list_begins_with_the_shorter_one_and_the_stream_agrees() -> None:
    assert questions(count=50)[:20] == questions(count=20)
    stream = question_stream(TASK, split="train", seed=5)
    # Seven terms make repeats so rare that these fifty have none.
    assert list(itertools.islice(stream, 50)) == questions(count=50)


def test_seed_and_split_both_change_the_questions() -> None:
    first = {q.prompt for q in questions(seed=5)}
    assert len(first & {q.prompt for q in questions(seed=6)}) < 5
    assert [q.answer for q in questions("eval")] != [q.answer for q in questions("train")]


def test_another_process_with_another_hash_seed_draws_the_same() -> None:
    program = (
        "from megatron_precision.config.schema import TaskConfig\n"
        "from megatron_precision.data.arithmetic import make_questions\n"
        "task = TaskConfig(difficulty=7)\n"
        "print(make_questions(task, split='train', count=3, seed=5))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program],
            env={"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
        for hash_seed in ("1", "2")
    }
    assert found == {str(questions(count=3))}


def test_the_stream_does_not_end_where_the_list_does() -> None:
    task = TaskConfig(difficulty=2)
    prompts = [q.prompt for q in itertools.islice(question_stream(task, split="eval", seed=0), 500)]
    # 81 questions in all; 500 draws come back to the few of the split.
    assert len(set(prompts)) == sum(
        split_of(f"a{a}b{b}=") == "eval" for a in range(1, 10) for b in range(1, 10)
    )


def test_asking_a_small_task_for_too_many_questions_says_how_many_there_are() -> None:
    held = sum(split_of(f"a{a}b{b}=") == "train" for a in range(1, 10) for b in range(1, 10))
    with pytest.raises(ValueError, match=f"difficulty=2 holds {held} questions, expected 81"):
        make_questions(TaskConfig(difficulty=2), split="train", count=81, seed=0)


@pytest.mark.parametrize("difficulty", [1, 18])
def test_a_difficulty_without_steps_or_without_labels_is_refused(difficulty: int) -> None:
    with pytest.raises(ValueError, match=rf"task.difficulty: got {difficulty}, expected 2 to 17"):
        question_stream(TaskConfig(difficulty=difficulty), split="train", seed=0)


def test_a_negative_count_is_refused_and_zero_is_an_empty_list() -> None:
    with pytest.raises(ValueError, match="got -1, expected 0 or more"):
        questions(count=-1)
    assert questions(count=0) == []


def test_the_default_task_fits_the_lengths_that_the_config_promises() -> None:
    task = TaskConfig()
    tokenizer = CharTokenizer()
    drawn = make_questions(task, split="train", count=300, seed=1)
    responses = [len(tokenizer.encode(q.solution)) + 1 for q in drawn]
    assert max(len(tokenizer.encode(q.prompt)) for q in drawn) <= task.max_prompt_tokens
    assert min(responses) >= 32
    assert max(responses) <= 96


def test_a_question_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        questions(count=1)[0].answer = "0"  # type: ignore[misc]
