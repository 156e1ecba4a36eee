"""Aggregation against hand-worked numbers, and its invariance to how a mini-batch is cut."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_precision.config.schema import AlgorithmConfig
from megatron_precision.rl.aggregation import Normaliser, aggregate, normaliser
from megatron_precision.rl.algorithms import ALGORITHMS, Aggregation
from megatron_precision.rl.losses import token_loss

MODES: tuple[Aggregation, ...] = get_args(Aggregation)
EVERY_MODE = pytest.mark.parametrize("mode", MODES)
LENGTHS = torch.tensor([3, 1, 0, 6, 2, 6, 4])
MAX_RESPONSE_TOKENS = 6


def whole(mode: Aggregation, mask: Tensor) -> Normaliser:
    """The normaliser of a mini-batch that lies in one piece."""
    return normaliser(
        mode,
        num_sequences=mask.shape[0],
        num_tokens=int(mask.sum()),
        max_response_tokens=MAX_RESPONSE_TOKENS,
    )


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        # Sequences with losses (1, 2, 3), (10) and none; limit 6.
        ("token-mean", 16.0 / 4.0),  # (1 + 2 + 3 + 10) / 4 tokens
        ("seq-mean-token-mean", 4.0),  # (6/3 + 10/1 + 0) / 3 sequences
        ("seq-mean-token-sum", 16.0 / 3.0),  # (6 + 10 + 0) / 3
        ("seq-mean-token-sum-norm", 16.0 / 18.0),  # (6/6 + 10/6 + 0) / 3
    ],
)
def test_each_mode_by_hand(mode: Aggregation, expected: float) -> None:
    loss = torch.tensor([[1.0, 2.0, 3.0, 99.0], [10.0, 99.0, 99.0, 99.0], [99.0] * 4])
    mask = torch.arange(4)[None, :] < torch.tensor([3, 1, 0])[:, None]
    got = aggregate(loss, mask, mode, whole(mode, mask))
    assert got.item() == pytest.approx(expected, rel=1e-6)
    assert got.dtype == torch.float32
    assert got.shape == ()


def test_sum_norm_keeps_the_mean_over_sequences() -> None:
    # The same sequence four times: a mean over sequences does not see it, a sum is 4 times as big.
    loss = torch.tensor([[1.0, 2.0, 4.0]])
    mask = torch.ones(1, 3, dtype=torch.bool)
    mode: Aggregation = "seq-mean-token-sum-norm"
    once = aggregate(loss, mask, mode, whole(mode, mask))
    repeated = mask.repeat(4, 1)
    four_times = aggregate(loss.repeat(4, 1), repeated, mode, whole(mode, repeated))
    assert once.item() == pytest.approx(7.0 / 6.0)
    assert four_times.item() == pytest.approx(7.0 / 6.0)


def test_sum_norm_divides_by_the_limit_and_not_by_the_longest_response() -> None:
    loss = torch.ones(2, 3)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    mode: Aggregation = "seq-mean-token-sum-norm"
    made = normaliser(mode, num_sequences=2, num_tokens=4, max_response_tokens=8192)
    assert aggregate(loss, mask, mode, made).item() == pytest.approx(4.0 / (2 * 8192))


@EVERY_MODE
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_parts_add_up_to_the_mini_batch_however_it_is_cut(
    mode: Aggregation, data: st.DataObject
) -> None:
    """Uneven cuts, shuffled over ranks, each part padded to its own longest sequence."""
    order = data.draw(st.permutations(range(len(LENGTHS))))
    cuts = data.draw(st.sets(st.integers(1, len(LENGTHS) - 1)))
    bounds = [0, *sorted(cuts), len(LENGTHS)]
    parts = [order[a:b] for a, b in itertools.pairwise(bounds)]
    mask = torch.arange(MAX_RESPONSE_TOKENS)[None, :] < LENGTHS[:, None]
    generator = torch.Generator().manual_seed(3)
    loss = torch.randn(mask.shape, generator=generator, dtype=torch.float64).requires_grad_()
    made = whole(mode, mask)
    expected = aggregate(loss, mask, mode, made)
    (expected_grad,) = torch.autograd.grad(expected, loss)

    total = torch.zeros((), dtype=torch.float64)
    for rows in parts:
        width = int(LENGTHS[rows].max())
        total = total + aggregate(loss[rows, :width], mask[rows, :width], mode, made)
    (grad,) = torch.autograd.grad(total, loss)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ALGORITHMS)
@EVERY_MODE
@pytest.mark.parametrize("sizes", [(7,), (4, 3), (1, 5, 1), (1,) * 7, (2, 0, 5)], ids=str)
def test_fp32_loss_and_parameter_gradient_do_not_depend_on_the_cut(
    name: str, mode: Aggregation, sizes: tuple[int, ...]
) -> None:
    """Through token_loss to the parameters of a tiny policy, as gradient accumulation does it."""
    generator = torch.Generator().manual_seed(11)
    vocab_size, num_seqs = 5, len(LENGTHS)
    logits = torch.randn(MAX_RESPONSE_TOKENS, vocab_size, generator=generator)
    tokens = torch.randint(vocab_size, (num_seqs, MAX_RESPONSE_TOKENS), generator=generator)
    noise = 0.3 * torch.randn(2, num_seqs, MAX_RESPONSE_TOKENS, generator=generator)
    advantages = torch.randn(num_seqs, generator=generator)
    mask = torch.arange(MAX_RESPONSE_TOKENS)[None, :] < LENGTHS[:, None]
    made = whole(mode, mask)

    def loss_and_gradient(cut: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        parameter = logits.to(dtype).requires_grad_()
        total = torch.zeros((), dtype=dtype)
        for rows in torch.arange(num_seqs).split(list(cut)):
            logprobs = parameter.log_softmax(dim=1)
            train = logprobs[torch.arange(MAX_RESPONSE_TOKENS)[None, :], tokens[rows]]
            result = token_loss(
                ALGORITHMS[name],
                AlgorithmConfig(),
                train_logprobs=train,
                old_logprobs=train.detach() + noise[0, rows].to(dtype),
                rollout_logprobs=train.detach() + noise[1, rows].to(dtype),
                advantages=advantages[rows].to(dtype),
                mask=mask[rows],
            )
            part = aggregate(result.loss, mask[rows], mode, made)
            part.backward()
            total += part.detach()
        assert parameter.grad is not None
        return total, parameter.grad

    expected, expected_grad = loss_and_gradient((num_seqs,), torch.float64)
    total, grad = loss_and_gradient(sizes, torch.float32)
    torch.testing.assert_close(total.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), expected_grad, rtol=1e-5, atol=1e-6)
    assert expected_grad.abs().max() > 1e-3


def test_the_mean_of_micro_batch_means_is_another_number() -> None:
    # What the normaliser prevents: parts of 1 and 3 tokens, (8 + (1+1+2)/3) / 2 = 14/3, not 12/4.
    loss = torch.tensor([[8.0, 0.0, 0.0], [1.0, 1.0, 2.0]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    made = whole("token-mean", mask)
    parts = [aggregate(loss[[i]], mask[[i]], "token-mean", made).item() for i in range(2)]
    means = [
        aggregate(loss[[i]], mask[[i]], "token-mean", whole("token-mean", mask[[i]])).item()
        for i in range(2)
    ]
    assert sum(parts) == pytest.approx(3.0)
    assert sum(means) / 2 == pytest.approx(14.0 / 3.0)


@EVERY_MODE
@pytest.mark.parametrize("shape", [(3, 4), (3, 0), (0, 4)])
def test_nothing_left_after_masking_is_zero_with_gradient_zero(
    mode: Aggregation, shape: tuple[int, int]
) -> None:
    loss = torch.full(shape, math.nan, requires_grad=True)
    mask = torch.zeros(shape, dtype=torch.bool)
    total = aggregate(loss, mask, mode, whole(mode, mask))
    total.backward()
    assert total.item() == 0.0
    assert loss.grad is not None
    assert torch.equal(loss.grad, torch.zeros(shape))


@EVERY_MODE
@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_a_masked_loss_adds_nothing(mode: Aggregation, garbage: float) -> None:
    mask = torch.tensor([[True, True, False], [True, False, False]])
    clean = torch.tensor([[1.0, 2.0, 0.0], [4.0, 0.0, 0.0]])
    dirty = clean.masked_fill(~mask, garbage).requires_grad_()
    total = aggregate(dirty, mask, mode, whole(mode, mask))
    total.backward()
    assert torch.equal(total.detach(), aggregate(clean, mask, mode, whole(mode, mask)))
    assert dirty.grad is not None
    assert torch.equal(dirty.grad[~mask], torch.zeros(3))


@EVERY_MODE
def test_a_non_finite_loss_that_counts_is_not_hidden(mode: Aggregation) -> None:
    mask = torch.tensor([[True, True]])
    total = aggregate(torch.tensor([[1.0, math.nan]]), mask, mode, whole(mode, mask))
    assert torch.isnan(total)


def test_a_normaliser_of_another_mode_is_refused() -> None:
    made = normaliser("token-mean", num_sequences=1, num_tokens=2, max_response_tokens=4)
    with pytest.raises(ValueError, match="made for token-mean, expected seq-mean-token-sum"):
        aggregate(torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool), "seq-mean-token-sum", made)


def test_an_unknown_mode_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'seq-mean'.*token-mean, seq-mean-token-mean"):
        normaliser("seq-mean", num_sequences=1, num_tokens=1, max_response_tokens=1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "counts",
    [
        {"num_sequences": -1, "num_tokens": 1, "max_response_tokens": 1},
        {"num_sequences": 1, "num_tokens": -1, "max_response_tokens": 1},
        {"num_sequences": 1, "num_tokens": 1, "max_response_tokens": 0},
    ],
)
def test_impossible_counts_are_refused(counts: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="expected counts of at least 0"):
        normaliser("token-mean", **counts)
