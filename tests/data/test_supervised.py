"""Batches of the warm start, against sequences written out by hand."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from megatron_precision.config.schema import TaskConfig
from megatron_precision.data.arithmetic import (
    CharTokenizer,
    Question,
    make_batch,
    split_of,
    warm_start_batches,
)

SHORT = Question(id="s", prompt="a1b2=", answer="3", solution="b1+2=3")
LONG = Question(id="l", prompt="a9b8=", answer="17", solution="b9+8=17")
# Ids by hand: padding 0, end 1, digits 2..11, + 12, = 13, comma 14, a 15, b 16.
SHORT_TOKENS = [15, 3, 16, 4, 13, 16, 3, 12, 4, 13, 5, 1, 0]
LONG_TOKENS = [15, 11, 16, 10, 13, 16, 11, 12, 10, 13, 3, 9, 1]


def test_tokens_are_prompt_solution_end_and_padding_on_the_right() -> None:
    batch = make_batch([SHORT, LONG], CharTokenizer())
    assert batch.tokens.tolist() == [SHORT_TOKENS, LONG_TOKENS]
    assert batch.lengths.tolist() == [12, 13]
    assert batch.tokens.dtype == batch.lengths.dtype == np.int64


def test_the_loss_is_on_the_solution_and_the_end_token_only() -> None:
    batch = make_batch([SHORT, LONG], CharTokenizer())
    assert batch.loss_mask.dtype == np.bool_
    assert batch.loss_mask.astype(int).tolist() == [
        [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1],
    ]


def test_the_length_is_rounded_up_to_the_multiple_with_padding_that_is_not_trained_on() -> None:
    batch = make_batch([SHORT, LONG], CharTokenizer(), pad_to_multiple=8)
    assert batch.tokens.shape == batch.loss_mask.shape == (2, 16)
    assert not batch.tokens[:, 13:].any()
    assert not batch.loss_mask[:, 13:].any()
    assert make_batch([SHORT], CharTokenizer(), pad_to_multiple=6).tokens.shape == (1, 12)


def test_a_character_without_a_token_stops_the_batch() -> None:
    with pytest.raises(ValueError, match="no token for '%'"):
        make_batch([Question(id="x", prompt="a1=", answer="1", solution="%")], CharTokenizer())


def test_an_empty_batch_and_a_multiple_of_zero_are_refused() -> None:
    with pytest.raises(ValueError, match="at least one question"):
        make_batch([], CharTokenizer())
    with pytest.raises(ValueError, match="pad_to_multiple: got 0"):
        make_batch([SHORT], CharTokenizer(), pad_to_multiple=0)
    with pytest.raises(ValueError, match="batch_size: got 0"):
        warm_start_batches(TaskConfig(), CharTokenizer(), batch_size=0, seed=1)


def test_the_stream_repeats_itself_call_by_call_and_moves_on_batch_by_batch() -> None:
    task, tokenizer = TaskConfig(difficulty=3), CharTokenizer()
    first, second = (
        list(itertools.islice(warm_start_batches(task, tokenizer, batch_size=5, seed=seed), 3))
        for seed in (7, 7)
    )
    for one, other in zip(first, second, strict=True):
        assert np.array_equal(one.tokens, other.tokens)
        assert np.array_equal(one.loss_mask, other.loss_mask)
    assert first[0].tokens.tolist() != first[1].tokens.tolist()
    changed = next(warm_start_batches(task, tokenizer, batch_size=5, seed=8))
    assert changed.tokens.tolist() != first[0].tokens.tolist()


def test_the_stream_holds_warm_start_questions_only() -> None:
    tokenizer = CharTokenizer()
    stream = warm_start_batches(TaskConfig(difficulty=3), tokenizer, batch_size=16, seed=2)
    for batch in itertools.islice(stream, 6):
        for row in batch.tokens.tolist():
            assert split_of(tokenizer.decode(row[:7])) == "warm_start"
