"""Token losses against hand-worked numbers, limits, closed-form gradients and an exact expectation.

Does not cover how token losses become one number: test_aggregation.py.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_precision.config.schema import AlgorithmConfig
from megatron_precision.rl.algorithms import ALGORITHMS, Algorithm
from megatron_precision.rl.losses import TokenLoss, token_loss
from tests.rl.paper_formulas import loss_and_gradient

PPO = ALGORITHMS["PPO"]
PG_SEQ_IS = ALGORITHMS["PG-Seq-IS"]
PLAIN_PG = dataclasses.replace(PG_SEQ_IS, name="plain PG", correction="none")
CONSTANTS = AlgorithmConfig(clip_low=0.2, clip_high=0.28, log_weight_clamp=20.0)
EVERY_ALGORITHM = pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=lambda a: a.name)


def random_inputs(dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Three sequences of up to five tokens, with lengths 5, 2 and 3."""
    generator = torch.Generator().manual_seed(5)
    train = -3.0 * torch.rand(3, 5, generator=generator, dtype=torch.float64)
    old = train + 0.4 * torch.randn(3, 5, generator=generator, dtype=torch.float64)
    rollout = train + 0.1 * torch.randn(3, 5, generator=generator, dtype=torch.float64)
    return {
        "train_logprobs": train.to(dtype).requires_grad_(),
        "old_logprobs": old.to(dtype),
        "rollout_logprobs": rollout.to(dtype),
        "advantages": torch.tensor([0.75, -0.5, 1.25], dtype=dtype),
        "mask": torch.arange(5)[None, :] < torch.tensor([5, 2, 3])[:, None],
    }


def run(
    algorithm: Algorithm, inputs: dict[str, Tensor], **changes: Any
) -> tuple[TokenLoss, Tensor]:
    """The token losses and the gradient of their sum with respect to train_logprobs."""
    merged = {**inputs, **changes}
    result = token_loss(algorithm, CONSTANTS, **merged)
    (grad,) = torch.autograd.grad(result.loss.sum(), merged["train_logprobs"])
    return result, grad


def test_ppo_clip_takes_the_larger_of_both_branches() -> None:
    # clip_low 0.2 and clip_high 0.28 bound the ratio to [0.8, 1.28].
    # A = 2:  r = 1.5   -rA = -3    -1.28 * 2 = -2.56   max -2.56   clipped, gradient 0
    #         r = 0.5   -rA = -1    -0.8 * 2  = -1.6    max -1      gradient -rA = -1
    #         r = 1.1   -rA = -2.2  -1.1 * 2  = -2.2    equal       gradient -rA = -2.2
    # A = -1: r = 1.5   -rA = 1.5   1.28                max 1.5     gradient 1.5
    #         r = 0.5   -rA = 0.5   0.8                 max 0.8     clipped, gradient 0
    #         third token masked
    ratio = torch.tensor([[1.5, 0.5, 1.1], [1.5, 0.5, 9.0]], dtype=torch.float64)
    old = torch.tensor([[-1.0, -2.0, -0.5], [-0.25, -4.0, -1.0]], dtype=torch.float64)
    result, grad = run(
        PPO,
        {
            "train_logprobs": (old + ratio.log()).requires_grad_(),
            "old_logprobs": old,
            "rollout_logprobs": old - 0.3,
            "advantages": torch.tensor([2.0, -1.0], dtype=torch.float64),
            "mask": torch.tensor([[True, True, True], [True, True, False]]),
        },
    )
    expected_loss = torch.tensor([[-2.56, -1.0, -2.2], [1.5, 0.8, 0.0]], dtype=torch.float64)
    expected_grad = torch.tensor([[0.0, -1.0, -2.2], [1.5, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(result.loss.detach(), expected_loss)
    torch.testing.assert_close(grad, expected_grad)
    assert result.clipped.tolist() == [[True, False, False], [False, True, False]]
    torch.testing.assert_close(result.ratio, ratio * torch.tensor([[1, 1, 1], [1, 1, 0]]))
    assert result.weight.tolist() == [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0]]


def test_pg_seq_is_weighs_every_token_by_the_product_over_its_sequence() -> None:
    # Sequence 0: pi = 1/2, 1/4; mu = 1/4, 1/8; rho = 2 * 2 = 4; A = 3.
    #   losses -4 * 3 * ln(1/2) = 12 ln 2 and -4 * 3 * ln(1/4) = 24 ln 2; gradient -12 each.
    # Sequence 1: pi = 1/2, 1/2, 1/8; mu = 1, 1/2, 1/4; rho = 1/2 * 1 * 1/2 = 1/4; A = -2.
    #   losses -1/4 * -2 * ln(1/2) = -ln(2)/2, the same, and 1/2 * ln(1/8) = -1.5 ln 2;
    #   gradient 1/2 each.
    pi = torch.tensor([[0.5, 0.25, 0.9], [0.5, 0.5, 0.125]], dtype=torch.float64)
    mu = torch.tensor([[0.25, 0.125, 0.1], [1.0, 0.5, 0.25]], dtype=torch.float64)
    result, grad = run(
        PG_SEQ_IS,
        {
            "train_logprobs": pi.log().requires_grad_(),
            "rollout_logprobs": mu.log(),
            "advantages": torch.tensor([3.0, -2.0], dtype=torch.float64),
            "mask": torch.tensor([[True, True, False], [True, True, True]]),
        },
        old_logprobs=None,
    )
    ln2 = math.log(2.0)
    expected_loss = [[12 * ln2, 24 * ln2, 0.0], [-0.5 * ln2, -0.5 * ln2, -1.5 * ln2]]
    expected_grad = [[-12.0, -12.0, 0.0], [0.5, 0.5, 0.5]]
    expected_weight = [[4.0, 4.0, 0.0], [0.25, 0.25, 0.25]]
    expected_ratio = [[2.0, 2.0, 0.0], [0.5, 1.0, 0.5]]
    for got, expected in (
        (result.loss.detach(), expected_loss),
        (grad, expected_grad),
        (result.weight, expected_weight),
        (result.ratio, expected_ratio),
    ):
        torch.testing.assert_close(got, torch.tensor(expected, dtype=torch.float64))
    assert not result.clipped.any()


def test_pg_seq_is_has_the_exact_policy_gradient_as_its_expectation_under_mu() -> None:
    """Sum over all 9 sequences of two tokens: E_mu[grad of the loss] = -grad E_pi[A]."""
    logits = torch.tensor([[0.3, -0.7, 1.1], [0.2, 0.9, -0.4]], dtype=torch.float64)
    logits.requires_grad_()
    engine_logits = torch.tensor([[0.5, -0.2, 0.6], [-0.3, 1.2, 0.1]], dtype=torch.float64)
    sequences = torch.tensor(list(itertools.product(range(3), repeat=2)))
    advantages = torch.linspace(-1.5, 2.5, 9, dtype=torch.float64) ** 2 - 1.0
    positions = torch.arange(2)[None, :]
    train_logprobs = logits.log_softmax(dim=1)[positions, sequences]
    rollout_logprobs = engine_logits.log_softmax(dim=1)[positions, sequences]
    mu = rollout_logprobs.sum(dim=1).exp()

    result = token_loss(
        PG_SEQ_IS,
        CONSTANTS,
        train_logprobs=train_logprobs,
        old_logprobs=None,
        rollout_logprobs=rollout_logprobs,
        advantages=advantages,
        mask=torch.ones(9, 2, dtype=torch.bool),
    )
    (grad,) = torch.autograd.grad((mu * result.loss.sum(dim=1)).sum(), logits, retain_graph=True)
    pi = train_logprobs.sum(dim=1).exp()
    (exact,) = torch.autograd.grad(-(pi * advantages).sum(), logits)
    torch.testing.assert_close(grad, exact)
    assert exact.abs().max() > 0.1


def test_at_ratio_one_ppo_has_the_gradient_of_the_policy_gradient() -> None:
    inputs = random_inputs()
    ppo, ppo_grad = run(PPO, inputs, old_logprobs=inputs["train_logprobs"].detach().clone())
    _, pg_grad = run(PLAIN_PG, inputs)
    assert torch.equal(ppo.ratio, inputs["mask"].float())
    assert not ppo.clipped.any()
    assert torch.equal(ppo_grad, pg_grad)


def test_where_the_engine_agrees_pg_seq_is_is_plain_policy_gradient() -> None:
    inputs = random_inputs()
    same = inputs["train_logprobs"].detach().clone()
    weighed, weighed_grad = run(PG_SEQ_IS, inputs, rollout_logprobs=same)
    plain, plain_grad = run(PLAIN_PG, inputs)
    assert torch.equal(weighed.weight, inputs["mask"].float())
    assert torch.equal(weighed.loss, plain.loss)
    assert torch.equal(weighed_grad, plain_grad)


@EVERY_ALGORITHM
def test_fp32_agrees_with_scalar_fp64(algorithm: Algorithm) -> None:
    inputs = random_inputs()
    result, grad = run(algorithm, inputs)
    oracle = loss_and_gradient(algorithm.name, inputs)
    for got, expected in zip((result.loss, grad), oracle, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-6, atol=1e-7)
    assert result.loss.dtype == result.weight.dtype == result.ratio.dtype == torch.float32


@settings(max_examples=200, deadline=None)
@given(
    train=st.lists(st.floats(-12.0, -1e-6), min_size=3, max_size=3),
    shift=st.lists(st.floats(-2.0, 2.0), min_size=3, max_size=3),
    advantage=st.floats(-3.0, 3.0),
    engine_shift=st.lists(st.floats(-2.0, 2.0), min_size=3, max_size=3),
    name=st.sampled_from(list(ALGORITHMS)),
)
def test_any_sequence_agrees_with_scalar_fp64(
    train: list[float],
    shift: list[float],
    engine_shift: list[float],
    advantage: float,
    name: str,
) -> None:
    train_logprobs = torch.tensor([train], dtype=torch.float64)
    old = train_logprobs - torch.tensor([shift], dtype=torch.float64)
    inputs = {
        "train_logprobs": train_logprobs.requires_grad_(),
        "old_logprobs": old,
        "rollout_logprobs": old - torch.tensor([engine_shift], dtype=torch.float64),
        "advantages": torch.tensor([advantage], dtype=torch.float64),
        "mask": torch.tensor([[True, True, False]]),
    }
    result, grad = run(ALGORITHMS[name], inputs)
    expected_loss, expected_grad = loss_and_gradient(name, inputs)
    torch.testing.assert_close(result.loss.detach(), expected_loss, rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-9, atol=1e-11)


@EVERY_ALGORITHM
@pytest.mark.parametrize("garbage", [math.nan, -math.inf, math.inf, -1e30])
def test_padding_contributes_exactly_nothing(algorithm: Algorithm, garbage: float) -> None:
    inputs = random_inputs()
    clean, clean_grad = run(algorithm, inputs)
    dirty_inputs = {
        name: inputs[name].detach().masked_fill(~inputs["mask"], garbage)
        for name in ("train_logprobs", "old_logprobs", "rollout_logprobs")
    }
    dirty_inputs["train_logprobs"].requires_grad_()
    dirty, dirty_grad = run(algorithm, inputs, **dirty_inputs)
    for field in dataclasses.fields(TokenLoss):
        assert torch.equal(getattr(dirty, field.name), getattr(clean, field.name)), field.name
        assert not getattr(dirty, field.name)[~inputs["mask"]].any(), field.name
    assert torch.equal(dirty_grad, clean_grad)
    assert torch.equal(dirty_grad[~inputs["mask"]], torch.zeros(5))


@EVERY_ALGORITHM
def test_a_sequence_that_is_all_masked_changes_no_other_one(algorithm: Algorithm) -> None:
    inputs = random_inputs()
    inputs["mask"][1] = False
    inputs["advantages"][1] = math.nan
    result, grad = run(algorithm, inputs)
    kept = [0, 2]
    alone = {name: tensor.detach()[kept] for name, tensor in inputs.items()}
    alone["train_logprobs"].requires_grad_()
    expected, expected_grad = run(algorithm, alone)
    assert torch.equal(result.loss[kept], expected.loss)
    assert torch.equal(grad[kept], expected_grad)
    assert torch.equal(result.loss[1], torch.zeros(5))
    assert torch.equal(grad[1], torch.zeros(5))


@EVERY_ALGORITHM
@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (3, 5)])
def test_a_batch_with_nothing_in_it_is_defined(
    algorithm: Algorithm, shape: tuple[int, int]
) -> None:
    logprobs = torch.full(shape, -1.0)
    result, grad = run(
        algorithm,
        {
            "train_logprobs": logprobs.clone().requires_grad_(),
            "old_logprobs": logprobs,
            "rollout_logprobs": logprobs,
            "advantages": torch.ones(shape[0]),
            "mask": torch.zeros(shape, dtype=torch.bool),
        },
    )
    assert torch.equal(result.loss, torch.zeros(shape))
    assert torch.equal(grad, torch.zeros(shape))


@EVERY_ALGORITHM
def test_advantage_zero_gives_no_gradient(algorithm: Algorithm) -> None:
    _, grad = run(algorithm, random_inputs(), advantages=torch.zeros(3))
    assert not grad.any()


@pytest.mark.parametrize(
    ("log_weight", "expected"),
    [
        (0.0, 1.0),
        (19.0, 178482300.96318725),  # e^19
        (20.0, 485165195.4097903),  # e^20
        (25.0, 485165195.4097903),  # the clamp
        (300.0, 485165195.4097903),
        (-30.0, 9.357622968840175e-14),  # e^-30: the lower side is not clamped
        (-500.0, 0.0),  # below FP32
    ],
)
def test_log_weights_are_clamped_above_and_not_below(log_weight: float, expected: float) -> None:
    inputs = {
        "train_logprobs": torch.tensor([[-0.5, -0.5 + log_weight]], requires_grad=True),
        "rollout_logprobs": torch.tensor([[-0.5, -0.5]]),
        "old_logprobs": torch.tensor([[-0.5, -0.5]]),
        "advantages": torch.tensor([-1.0]),
        "mask": torch.ones(1, 2, dtype=torch.bool),
    }
    sequence, _ = run(PG_SEQ_IS, inputs)
    torch.testing.assert_close(sequence.weight, torch.full((1, 2), expected), rtol=1e-5, atol=0.0)
    token, grad = run(PPO, inputs)
    torch.testing.assert_close(token.ratio, torch.tensor([[1.0, expected]]), rtol=1e-5, atol=0.0)
    assert torch.isfinite(grad).all()


def test_the_clamp_acts_on_the_sequence_and_not_on_its_tokens() -> None:
    # Ten tokens of log-ratio 3 sum to 30; each alone is far below 20.
    result, _ = run(
        PG_SEQ_IS,
        {
            "train_logprobs": torch.full((1, 10), -1.0, requires_grad=True),
            "rollout_logprobs": torch.full((1, 10), -4.0),
            "advantages": torch.ones(1),
            "mask": torch.ones(1, 10, dtype=torch.bool),
        },
        old_logprobs=None,
    )
    torch.testing.assert_close(result.weight, torch.full((1, 10), math.exp(20.0)))


@pytest.mark.parametrize("value", [math.nan, -math.inf, math.inf])
@pytest.mark.parametrize(
    ("algorithm", "side"),
    [
        (PPO, "train_logprobs"),
        (PPO, "old_logprobs"),
        (PG_SEQ_IS, "train_logprobs"),
        (PG_SEQ_IS, "rollout_logprobs"),
        *((ALGORITHMS["Vanilla-GSPO"], side) for side in ("train_logprobs", "old_logprobs")),
        *(
            (ALGORITHMS[name], side)
            for name in ("PPO-Token-TIS", "PPO-Seq-TIS", "PPO-Seq-MIS", "PPO-Token-IcePop")
            for side in ("train_logprobs", "old_logprobs", "rollout_logprobs")
        ),
        *((ALGORITHMS["PG-Seq-MIS"], side) for side in ("train_logprobs", "rollout_logprobs")),
    ],
)
def test_a_log_prob_that_is_not_finite_is_never_clamped_into_a_loss(
    algorithm: Algorithm, side: str, value: float
) -> None:
    inputs = random_inputs()
    broken = inputs[side].detach().clone()
    broken[2, 1] = value
    if side == "train_logprobs":
        broken.requires_grad_()
    result, _ = run(algorithm, inputs, **{side: broken})
    assert not torch.isfinite(result.loss[2, 1])
    assert torch.isfinite(result.loss[:2]).all()


@EVERY_ALGORITHM
def test_only_the_loss_carries_gradient(algorithm: Algorithm) -> None:
    result, _ = run(algorithm, random_inputs())
    assert result.loss.requires_grad
    others = [field.name for field in dataclasses.fields(TokenLoss) if field.name != "loss"]
    assert not any(getattr(result, name).requires_grad for name in others)


def test_missing_old_logprobs_name_the_algorithm() -> None:
    with pytest.raises(ValueError, match="algorithm PPO: old_logprobs are missing"):
        run(PPO, random_inputs(), old_logprobs=None)


def test_old_logprobs_are_not_read_where_the_algorithm_needs_none() -> None:
    inputs = random_inputs()
    expected, _ = run(PG_SEQ_IS, inputs, old_logprobs=None)
    result, _ = run(PG_SEQ_IS, inputs, old_logprobs=torch.full((3, 5), math.nan))
    assert torch.equal(result.loss, expected.loss)


def test_every_input_that_does_not_fit_is_listed() -> None:
    with pytest.raises(ValueError, match="do not fit train_logprobs") as raised:
        run(
            PPO,
            random_inputs(),
            advantages=torch.zeros(3, 1),
            mask=torch.ones(3, 5),
            rollout_logprobs=torch.zeros(3, 4),
            old_logprobs=torch.zeros(3, 5, dtype=torch.float64),
        )
    message = str(raised.value)
    for name in ("advantages: got", "mask: got", "rollout_logprobs: got", "old_logprobs: got"):
        assert name in message


def test_train_logprobs_below_fp32_are_refused() -> None:
    half = random_inputs()["train_logprobs"].detach().half()
    with pytest.raises(ValueError, match=r"train_logprobs: got .* expected .*float32"):
        run(PPO, random_inputs(), train_logprobs=half)
