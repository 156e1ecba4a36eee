"""Plans of micro-batches, by hand and by counting.

Not covered: how long a micro-batch really takes; costs are counted operations.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_precision.actor.packing import (
    Packing,
    attention_tokens,
    dp_imbalance,
    padding_share,
    plan_micro_batches,
)
from megatron_precision.config.schema import ModelConfig

# Widths are at most 48 + 23 here, so a budget of 71 holds any sequence.
packings = st.builds(
    Packing,
    dp_size=st.integers(1, 5),
    micro_batch_size=st.integers(1, 5),
    micro_batch_tokens=st.just(0) | st.integers(71, 400),
    width_multiple=st.sampled_from([1, 8, 24]),
    attention_tokens=st.sampled_from([7.0, 90.0, float("inf")]),
    packed=st.booleans(),
)


def lengths_and_rows(seed: int, per_rank: int, extra: int, dp_size: int) -> list[torch.Tensor]:
    """Lengths of a batch with a long tail, and some of its rows in any order."""
    generator = torch.Generator().manual_seed(seed)
    total = dp_size * per_rank + extra
    lengths = 1 + (47 * torch.rand(total, generator=generator) ** 3).long()
    return [lengths, torch.randperm(total, generator=generator)[: dp_size * per_rank]]


@given(
    packing=packings,
    per_rank=st.integers(1, 9),
    extra=st.integers(0, 4),
    seed=st.integers(0, 1000),
)
@settings(max_examples=150, deadline=None)
def test_every_row_is_in_one_micro_batch_of_one_rank_and_ranks_have_equally_many(
    packing: Packing, per_rank: int, extra: int, seed: int
) -> None:
    lengths, rows = lengths_and_rows(seed, per_rank, extra, packing.dp_size)
    plans = plan_micro_batches(lengths, rows, packing)
    planned = [row for plan in plans for micro in plan for row in micro.rows.tolist()]
    assert sorted(planned) == sorted(rows.tolist())
    assert len(plans) == packing.dp_size
    assert len({len(plan) for plan in plans}) == 1
    for micro in (micro for plan in plans for micro in plan):
        longest = int(lengths[micro.rows].max())
        assert micro.width % packing.width_multiple == 0
        assert longest <= micro.width < longest + packing.width_multiple
        real = int(lengths[micro.rows].sum())
        if packing.packed:
            assert micro.tokens % packing.width_multiple == 0
            assert real <= micro.tokens < real + packing.width_multiple
        else:
            assert micro.tokens == len(micro.rows) * micro.width
        if packing.micro_batch_tokens:
            assert 1 <= micro.tokens <= packing.micro_batch_tokens
        else:
            assert 1 <= len(micro.rows) <= packing.micro_batch_size


@given(packing=packings, per_rank=st.integers(1, 9), seed=st.integers(0, 1000))
@settings(max_examples=100, deadline=None)
def test_ranks_differ_by_no_more_than_the_micro_batches_do(
    packing: Packing, per_rank: int, seed: int
) -> None:
    packing = dataclasses.replace(packing, micro_batch_tokens=packing.micro_batch_tokens or 100)
    lengths, rows = lengths_and_rows(seed, per_rank, 0, packing.dp_size)

    def cost(rows: torch.Tensor) -> float:
        if packing.packed:
            own = lengths[rows].double()
            return float((own + own**2 / packing.attention_tokens).sum())
        width = -(-int(lengths[rows].max()) // packing.width_multiple) * packing.width_multiple
        return len(rows) * (width + width**2 / packing.attention_tokens)

    costs = [
        [cost(micro.rows) for micro in plan] for plan in plan_micro_batches(lengths, rows, packing)
    ]
    loads = [sum(plan) for plan in costs]
    everyone = [value for plan in costs for value in plan]
    assert max(loads) - min(loads) <= max(everyone) - min(everyone) + 1e-6 * max(loads)


def test_by_count_rows_are_dealt_in_order_of_length() -> None:
    lengths = torch.tensor([3, 9, 5, 7, 1, 8])
    plans = plan_micro_batches(lengths, torch.arange(6), Packing(2, 2, width_multiple=4))
    got = [[(micro.rows.tolist(), micro.width) for micro in plan] for plan in plans]
    assert got == [[([1, 3], 12), ([0], 4)], [([5, 2], 8), ([4], 4)]]


def test_one_long_response_costs_its_rank_no_micro_batch_of_padding() -> None:
    # By count (two a micro-batch) 100 and 10 share one, and 90 tokens of padding are computed.
    lengths = torch.tensor([10, 100, 10, 10, 10, 10, 10, 10])
    by_count, by_tokens = Packing(1, 2), Packing(1, 2, micro_batch_tokens=100)
    rows = torch.arange(8)
    assert padding_share(lengths, plan_micro_batches(lengths, rows, by_count)) == pytest.approx(
        90 / 260
    )
    (plan,) = plan_micro_batches(lengths, rows, by_tokens)
    assert [(micro.rows.tolist(), micro.width) for micro in plan] == [
        ([1], 100),
        ([0, 2, 3, 4, 5, 6, 7], 10),
    ]
    assert padding_share(lengths, [plan]) == 0


def test_packed_sequences_fill_the_budget_and_pad_the_end_alone() -> None:
    lengths = torch.tensor([10, 100, 10, 10, 10, 10, 10, 10, 30])
    packing = Packing(1, 2, micro_batch_tokens=104, width_multiple=8, packed=True)
    (plan,) = plan_micro_batches(lengths, torch.arange(9), packing)
    got = [(micro.rows.tolist(), micro.width, micro.packed_tokens) for micro in plan]
    assert got == [([1], 104, 104), ([8, 0, 2, 3, 4, 5, 6, 7], 32, 104)]
    assert padding_share(lengths, [plan]) == pytest.approx(8 / 208)
    # Attention is within a sequence: 100 (1 + 100/50) against 30 (1 + 30/50) + 7 x 10 (1 + 10/50).
    quadratic = dataclasses.replace(packing, attention_tokens=50.0)
    costs = [quadratic.cost(micro, lengths) for micro in plan]
    assert costs == pytest.approx([300, 48 + 84])


def test_attention_is_balanced_and_not_tokens_alone() -> None:
    # 40 (1 + 40/10) = 200 is the work of ten sequences of 10 (1 + 10/10) = 20.
    lengths = torch.tensor([40, *[10] * 10])
    quadratic = Packing(2, 1, micro_batch_tokens=400, attention_tokens=10.0)
    plans = plan_micro_batches(lengths, torch.arange(11), quadratic)
    assert sorted(len(micro.rows) for plan in plans for micro in plan) == [1, 10]
    assert dp_imbalance(lengths, plans, quadratic) == pytest.approx(0, abs=1e-9)
    # By tokens alone the same split is 40 against 100.
    assert dp_imbalance(lengths, plans, Packing(2, 1)) == pytest.approx(100 / 70 - 1)


def test_the_width_at_which_attention_costs_as_much_as_the_weights_by_hand() -> None:
    model = ModelConfig(
        vocab_size=50, hidden_size=10, intermediate_size=30, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2, head_dim=5,
    )  # fmt: skip
    # A layer: q and output 10 x 20 each, k and v 10 x 10 each, MLP 3 x 300; the head 10 x 50.
    weights = 3 * (2 * 200 + 2 * 100 + 900) + 500
    # 2 operations a weight; attention over w/2 tokens on average: 2 x 2 x 20 x w/2 a layer.
    assert attention_tokens(model) == pytest.approx(2 * weights / (3 * 40))
    # Two of the experts of width 6 are active.
    sparse = dataclasses.replace(
        model, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=6
    )
    weights = 3 * (2 * 200 + 2 * 100 + 2 * 180) + 500
    assert attention_tokens(sparse) == pytest.approx(2 * weights / (3 * 40))


def test_rows_that_do_not_divide_over_the_ranks_are_refused() -> None:
    lengths = torch.ones(5, dtype=torch.int64)
    with pytest.raises(ValueError, match="5 sequences do not divide over 2"):
        plan_micro_batches(lengths, torch.arange(5), Packing(2, 2, width_multiple=8))
    with pytest.raises(ValueError, match=r"1 sequences for 2 .* one has none"):
        plan_micro_batches(lengths, torch.arange(1), Packing(2, 2, 64))
    with pytest.raises(ValueError, match=r"5 sequences in 5 micro-batches .* over 2 ranks"):
        plan_micro_batches(lengths, torch.arange(5), Packing(2, 2, 1))


def test_a_sequence_over_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="16 padded tokens is over the budget of 15"):
        plan_micro_batches(torch.tensor([3, 9]), torch.arange(2), Packing(1, 2, 15, 8))
