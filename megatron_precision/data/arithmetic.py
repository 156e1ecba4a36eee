"""Sums of labelled digits, with worked steps: the questions of the sanity experiment.

    prompt    a7b8c3d9=
    solution  b7+8=15,c3+15=18,d18+9=27
    answer    27

Each term has a label. A step names the next term's label, adds that term to the running total
and gives the new total; the last total is the answer. Labels let a two-layer model find the
next term, so that it learns within a minute and what is left to get wrong is the arithmetic. In
each step either operand may stand first, by a coin toss: without a choice to make a response
would have next to no entropy, and neither reinforcement learning nor the mismatch between two
engines would have much to act on.

Every question belongs to one split, by a hash of its prompt, whatever the seed is.
This module imports no torch.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_precision.config import TaskConfig
from megatron_precision.data.tokenizer import LABELS

Split = Literal["warm_start", "train", "eval"]

SMALLEST_TERM, LARGEST_TERM = 1, 9
MAX_TERMS = len(LABELS)

# Tenths of all questions that go to the two small splits; the warm start has the rest.
_EVAL_TENTHS = 1
_TRAIN_TENTHS = 3
# When this many draws in a row bring nothing new, a small task has no more to give.
_DRAWS_BEFORE_GIVING_UP = 20_000


@dataclass(frozen=True)
class Question:
    """A question, its answer and one way to work it out.

    Attributes:
        id: names the question, whatever split and seed it was drawn with; safe in a file name.
        prompt: what the model is given.
        answer: the final answer alone, as `rewards/arithmetic.py` expects it.
        solution: worked steps that end in the answer: the target of the warm start.
    """

    id: str
    prompt: str
    answer: str
    solution: str


def split_of(prompt: str) -> Split:
    """The split that a prompt belongs to: 1 in 10 eval, 3 in 10 train, 6 in 10 warm start."""
    tenth = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) % 10
    if tenth < _EVAL_TENTHS:
        return "eval"
    return "train" if tenth < _EVAL_TENTHS + _TRAIN_TENTHS else "warm_start"


def question_stream(task: TaskConfig, *, split: Split, seed: int) -> Iterator[Question]:
    """Questions of one split without end; a pure function of the arguments.

    A question can come again: independent draws are what a warm start wants.

    Raises:
        ValueError: for a difficulty outside 2 .. 17, and when a task is so small that the split
            has no question at all.
    """
    _check_difficulty(task)
    return _stream(task, split, seed)


def make_questions(task: TaskConfig, *, split: Split, count: int, seed: int) -> list[Question]:
    """Different questions of one split; a pure function of the arguments.

    The first `n` questions of a longer list are the shorter list.

    Args:
        task: `difficulty` is the number of terms.
        split: what the questions are for. Two splits never share a question.
        count: how many.
        seed: draws others of the same split.

    Raises:
        ValueError: for a negative count, for a difficulty outside 2 .. 17, and when the split
            has fewer questions than `count`.
    """
    if count < 0:
        raise ValueError(f"count of {split} questions: got {count}, expected 0 or more")
    found: dict[str, Question] = {}
    repeats_in_a_row = 0
    stream = question_stream(task, split=split, seed=seed)
    while len(found) < count:
        question = next(stream)
        repeats_in_a_row = repeats_in_a_row + 1 if question.prompt in found else 0
        if repeats_in_a_row == _DRAWS_BEFORE_GIVING_UP:
            raise ValueError(
                f"the {split} split of task.difficulty={task.difficulty} holds "
                f"{len(found)} questions, expected {count}: ask for fewer, or for more terms"
            )
        found.setdefault(question.prompt, question)
    return list(found.values())


def _check_difficulty(task: TaskConfig) -> None:
    if not 2 <= task.difficulty <= MAX_TERMS:
        raise ValueError(
            f"task.difficulty: got {task.difficulty}, expected 2 to {MAX_TERMS} terms "
            f"(one label each, {LABELS[0]} to {LABELS[-1]})"
        )


def _stream(task: TaskConfig, split: Split, seed: int) -> Iterator[Question]:
    named = f"{task.name}/{task.difficulty}/{split}/{seed}"
    draw = random.Random(hashlib.sha256(named.encode()).digest())
    misses = 0
    while misses < _DRAWS_BEFORE_GIVING_UP:
        terms = [draw.randint(SMALLEST_TERM, LARGEST_TERM) for _ in range(task.difficulty)]
        labelled = zip(LABELS[: task.difficulty], terms, strict=True)
        prompt = "".join(f"{label}{term}" for label, term in labelled) + "="
        if split_of(prompt) != split:
            misses += 1
            continue
        misses = 0
        yield Question(
            id=f"sum-{prompt[:-1]}",
            prompt=prompt,
            answer=str(sum(terms)),
            solution=_work_out(terms, draw),
        )
    raise ValueError(f"the {split} split of task.difficulty={task.difficulty} holds no question")


def _work_out(terms: list[int], draw: random.Random) -> str:
    total, steps = terms[0], []
    for label, term in zip(LABELS[1 : len(terms)], terms[1:], strict=True):
        left, right = (total, term) if draw.random() < 0.5 else (term, total)
        total += term
        steps.append(f"{label}{left}+{right}={total}")
    return ",".join(steps)
