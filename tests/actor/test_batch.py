"""Batches, by hand."""

from __future__ import annotations

import pytest
import torch

from megatron_precision.actor.batch import Batch, make_batch


def test_rollouts_are_laid_out_prompt_then_response_then_zeros() -> None:
    batch = make_batch(
        [[5, 6], [7]], [[8], [9, 10, 11]], [[-1.0], [-2.0, -3.0, -4.0]], torch.ones(2)
    )
    assert batch.tokens.tolist() == [[5, 6, 8, 0], [7, 9, 10, 11]]
    assert batch.response_mask.tolist() == [
        [False, False, True, False],
        [False, True, True, True],
    ]
    assert batch.lengths.tolist() == [3, 4]
    assert batch.rollout_logprobs.tolist() == [[0, 0, -1, 0], [0, -2, -3, -4]]
    assert batch.rollout_logprobs.dtype == batch.advantages.dtype == torch.float32


def test_an_empty_response_has_no_response_tokens() -> None:
    batch = make_batch([[5, 6, 7], [8]], [[], [9]], [[], [-1.0]], torch.tensor([1.0, -1.0]))
    assert batch.tokens.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert batch.response_mask.sum(1).tolist() == [0, 1]
    assert batch.lengths.tolist() == [3, 2]


def test_logprobs_that_do_not_match_the_response_are_refused() -> None:
    with pytest.raises(ValueError, match="rollout 1: 2 log-probs for 1 tokens"):
        make_batch([[1], [2]], [[3], [4]], [[-1.0], [-1.0, -2.0]], torch.ones(2))


def test_selection_pads_and_cuts_every_field_alike() -> None:
    batch = make_batch([[5], [6]], [[7, 8], [9]], [[-1.0, -2.0], [-3.0]], torch.tensor([4.0, 5.0]))
    batch = batch.with_old_logprobs(batch.rollout_logprobs * 2)
    wide = batch.select(torch.tensor([1]), 4)
    assert wide.tokens.tolist() == [[6, 9, 0, 0]]
    assert wide.rollout_logprobs.tolist() == [[0, -3, 0, 0]]
    assert wide.old_logprobs is not None
    assert wide.old_logprobs.tolist() == [[0, -6, 0, 0]]
    assert wide.advantages.tolist() == [5]
    narrow = batch.select(torch.tensor([1, 0]), 2)
    assert narrow.tokens.tolist() == [[6, 9], [5, 7]]
    assert isinstance(narrow, Batch)
    assert len(narrow) == 2
