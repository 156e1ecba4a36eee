"""Makes up the sanity experiment's questions: sums of labelled digits, with worked steps.

    prompt    a7b8c3d9=
    solution  b7+8=15,c3+15=18,d18+9=27
    answer    27

Each term has a label. A step names the next term's label, adds that term to the running total and
gives the new total; the last total is the answer. Labels let a two-layer model find the next term,
so it learns within a minute, and only the arithmetic is left to get wrong. Either operand of a step
may come first, by a coin toss: without a choice a response would have almost no entropy, and
neither RL nor the mismatch would have much to act on. A hash of its prompt assigns every question
to one split, whatever the seed.

Also here: `CharTokenizer`, one token per character, saved in Hugging Face's format, which refuses
characters outside its alphabet; and the batches of the supervised warm start (B sequences, T tokens
of the longest). This module imports no torch.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from megatron_precision.config.schema import TaskConfig

# What a question or its solution may contain. With the two special tokens that makes 32, the
# vocabulary size that `ModelConfig` starts from.
LABELS = "abcdefghijklmnopq"
ALPHABET = "0123456789+=," + LABELS

PAD_TOKEN = "<pad>"
EOS_TOKEN = "<eos>"


class CharTokenizer:
    """Characters to ids and back. There is no start token: a prompt is never empty.

    Attributes:
        pad_id: fills the right end of a batch; never sampled on purpose, never trained on.
        eos_id: ends a response.
        vocab_size: ids are 0 .. vocab_size - 1.
    """

    pad_id = 0
    eos_id = 1

    def __init__(self) -> None:
        self._tokens = [PAD_TOKEN, EOS_TOKEN, *ALPHABET]
        self._ids = {token: index for index, token in enumerate(self._tokens)}
        self.vocab_size = len(self._tokens)

    def encode(self, text: str) -> list[int]:
        """Encode a text, one id per character; no special token is added or recognised.

        Raises:
            ValueError: names every character outside the alphabet.
        """
        unknown = sorted(set(text) - set(ALPHABET))
        if unknown:
            raise ValueError(
                f"no token for {', '.join(map(repr, unknown))} in {text!r}: "
                f"expected only characters of {ALPHABET!r}"
            )
        return [self._ids[character] for character in text]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Decode ids.

        Args:
            ids: ids of any length.
            skip_special: leave `<pad>` and `<eos>` out of the text.

        Raises:
            ValueError: names every id outside the vocabulary.
        """
        ids = list(ids)
        outside = sorted({index for index in ids if not 0 <= index < self.vocab_size})
        if outside:
            raise ValueError(f"no token has the ids {outside}: expected 0 .. {self.vocab_size - 1}")
        special = {self.pad_id, self.eos_id} if skip_special else set()
        return "".join(self._tokens[index] for index in ids if index not in special)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which give the same ids.

        `transformers.PreTrainedTokenizerFast.from_pretrained(folder)` loads them. Unlike
        `encode`, a Hugging Face tokenizer reads the text `<eos>` as the special token.
        """
        folder.mkdir(parents=True, exist_ok=True)
        files = {"tokenizer.json": self._tokenizer_json(), "tokenizer_config.json": self._config()}
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _tokenizer_json(self) -> dict[str, object]:
        special = [
            {
                "id": index,
                "content": self._tokens[index],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index in (self.pad_id, self.eos_id)
        ]
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": special,
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": r"[\s\S]"},
                "behavior": "Isolated",
                "invert": False,
            },
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            # The unknown token is not in the vocabulary, so that an unknown character is an error.
            "model": {"type": "WordLevel", "vocab": self._ids, "unk_token": "<unk>"},
        }

    def _config(self) -> dict[str, object]:
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD_TOKEN,
            "eos_token": EOS_TOKEN,
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1_000_000,
        }


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
    """Return a prompt's split: 1 in 10 eval, 3 in 10 train, 6 in 10 warm start."""
    tenth = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8]) % 10
    if tenth < _EVAL_TENTHS:
        return "eval"
    return "train" if tenth < _EVAL_TENTHS + _TRAIN_TENTHS else "warm_start"


def question_stream(task: TaskConfig, *, split: Split, seed: int) -> Iterator[Question]:
    """Yield questions of one split without end; a pure function of the arguments.

    A question can come again: independent draws are what a warm start wants.

    Raises:
        ValueError: for a difficulty outside 2 .. 17, and when a task is so small that the split
            has no question at all.
    """
    _check_difficulty(task)
    return _stream(task, split, seed)


def make_questions(task: TaskConfig, *, split: Split, count: int, seed: int) -> list[Question]:
    """Make different questions of one split; a pure function of the arguments.

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


@dataclass(frozen=True, eq=False)
class SupervisedBatch:
    """Right-padded sequences: prompt, solution, end token, padding.

    Attributes:
        tokens: int64 [B, T].
        loss_mask: bool [B, T], true where the *token at that place* is one the model must learn
            to produce: the solution and the end token. Logits at place t predict the token at
            t + 1, so a loss pairs `logits[:, :-1]` with `tokens[:, 1:]` and `loss_mask[:, 1:]`.
        lengths: int64 [B], tokens of each sequence without padding.
    """

    tokens: npt.NDArray[np.int64]
    loss_mask: npt.NDArray[np.bool_]
    lengths: npt.NDArray[np.int64]


def make_batch(
    questions: Sequence[Question], tokenizer: CharTokenizer, *, pad_to_multiple: int = 1
) -> SupervisedBatch:
    """Encode questions with their solutions.

    Args:
        questions: at least one.
        tokenizer: encodes prompt and solution and gives the end and padding ids.
        pad_to_multiple: T is rounded up to a multiple of this, as sequence parallelism needs.

    Raises:
        ValueError: for no question, for a multiple below 1, and for characters without a token.
    """
    if not questions:
        raise ValueError("a supervised batch needs at least one question, got none")
    if pad_to_multiple < 1:
        raise ValueError(f"pad_to_multiple: got {pad_to_multiple}, expected 1 or more")
    prompts = [tokenizer.encode(question.prompt) for question in questions]
    responses = [[*tokenizer.encode(question.solution), tokenizer.eos_id] for question in questions]
    lengths = np.array([len(p) + len(r) for p, r in zip(prompts, responses, strict=True)])
    longest = -(-int(lengths.max()) // pad_to_multiple) * pad_to_multiple
    tokens = np.full((len(questions), longest), tokenizer.pad_id, dtype=np.int64)
    loss_mask = np.zeros((len(questions), longest), dtype=np.bool_)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        end = len(prompt) + len(response)
        tokens[row, :end] = prompt + response
        loss_mask[row, len(prompt) : end] = True
    return SupervisedBatch(tokens=tokens, loss_mask=loss_mask, lengths=lengths.astype(np.int64))


def warm_start_batches(
    task: TaskConfig,
    tokenizer: CharTokenizer,
    *,
    batch_size: int,
    seed: int,
    pad_to_multiple: int = 1,
) -> Iterator[SupervisedBatch]:
    """Yield batches of the warm-start split without end; a pure function of the arguments.

    Every rank that calls this with the same arguments sees the same batches; data-parallel
    ranks take their rows from them.

    Raises:
        ValueError: for a batch size below 1, and as `make_batch` and `question_stream` do.
    """
    if batch_size < 1:
        raise ValueError(f"warm_start.batch_size: got {batch_size}, expected 1 or more")
    questions = question_stream(task, split="warm_start", seed=seed)
    return (
        make_batch(
            list(itertools.islice(questions, batch_size)),
            tokenizer,
            pad_to_multiple=pad_to_multiple,
        )
        for _ in itertools.count()
    )
