"""Batches and micro-batches, by hand and by counting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_precision.actor.batch import Batch, make_batch, plan_micro_batches


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


@given(
    dp_size=st.integers(1, 5),
    per_rank=st.integers(1, 9),
    extra=st.integers(0, 4),
    micro_batch_size=st.integers(1, 5),
    width_multiple=st.sampled_from([1, 8, 24]),
    seed=st.integers(0, 1000),
)
@settings(max_examples=60, deadline=None)
def test_every_row_is_in_one_micro_batch_of_one_rank_and_ranks_have_equally_many(
    dp_size: int,
    per_rank: int,
    extra: int,
    micro_batch_size: int,
    width_multiple: int,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    total = dp_size * per_rank + extra
    lengths = torch.randint(1, 50, (total,), generator=generator)
    rows = torch.randperm(total, generator=generator)[: dp_size * per_rank]
    plans = [
        plan_micro_batches(
            lengths,
            rows,
            dp_rank=rank,
            dp_size=dp_size,
            micro_batch_size=micro_batch_size,
            width_multiple=width_multiple,
        )
        for rank in range(dp_size)
    ]
    planned = [row for plan in plans for micro in plan for row in micro.rows.tolist()]
    assert sorted(planned) == sorted(rows.tolist())
    # Equal numbers of micro-batches, and of rows in each: the experts' all-to-all needs both.
    assert len({tuple(len(micro.rows) for micro in plan) for plan in plans}) == 1
    for plan in plans:
        order = [int(lengths[row]) for micro in plan for row in micro.rows]
        assert order == sorted(order, reverse=True)
        for micro in plan:
            assert len(micro.rows) <= micro_batch_size
            longest = int(lengths[micro.rows].max())
            assert micro.width % width_multiple == 0
            assert longest <= micro.width < longest + width_multiple


def test_rows_that_do_not_divide_over_the_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="5 sequences do not divide over 2"):
        plan_micro_batches(
            torch.ones(5, dtype=torch.int64),
            torch.arange(5),
            dp_rank=0,
            dp_size=2,
            micro_batch_size=2,
            width_multiple=8,
        )
