"""Batches for the supervised warm start: prompt and worked solution as tokens, and a loss mask.

Shapes: B sequences, T tokens of the longest one. This module imports no torch;
`torch.from_numpy` takes its arrays without a copy.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from megatron_precision.config import TaskConfig
from megatron_precision.data.arithmetic import Question, question_stream
from megatron_precision.data.tokenizer import CharTokenizer


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
    """Batches of the warm-start split without end; a pure function of the arguments.

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
