"""GSPO's loss by hand, against its sequence-level formula, and where it is PPO."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from megatron_precision.config.schema import AlgorithmConfig
from megatron_precision.rl.aggregation import aggregate, normaliser
from megatron_precision.rl.algorithms import ALGORITHMS
from megatron_precision.rl.losses import token_loss

GSPO = ALGORITHMS["Vanilla-GSPO"]
FP64 = torch.float64


def sequences() -> dict[str, Tensor]:
    """Lengths 2, 3, 0; log-ratios (0.2, 0.4) with mean 0.3, and (-0.3, 0, 0.9) with mean 0.2."""
    old = torch.tensor([[-1.0, -2.0, 0.0], [-0.5, -1.5, -2.5], [0.0, 0.0, 0.0]], dtype=FP64)
    log_ratio = torch.tensor([[0.2, 0.4, 9.0], [-0.3, 0.0, 0.9], [9.0] * 3], dtype=FP64)
    return {
        "train_logprobs": (old + log_ratio).requires_grad_(),
        "old_logprobs": old,
        "rollout_logprobs": torch.full((3, 3), -50.0, dtype=FP64),
        "advantages": torch.tensor([-2.0, 1.0, 3.0], dtype=FP64),
        "mask": torch.arange(3)[None, :] < torch.tensor([2, 3, 0])[:, None],
    }


def mean_loss(constants: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """The aggregated loss and its gradient."""
    inputs = sequences()
    result = token_loss(GSPO, constants, **inputs)
    norm = normaliser(GSPO.aggregation, num_sequences=3, num_tokens=5, max_response_tokens=3)
    loss = aggregate(result.loss, inputs["mask"], GSPO.aggregation, norm)
    (grad,) = torch.autograd.grad(loss, inputs["train_logprobs"])
    return loss.detach(), grad


def test_every_token_has_the_sequences_ratio_and_clip() -> None:
    # s = e^0.3 with A = -2: max(2 e^0.3, 2 * 1.0004) = 2 e^0.3, gradient 2 e^0.3.
    # s = e^0.2 with A = 1:  max(-e^0.2, -1.0004) = -1.0004, clipped, gradient 0.
    inputs = sequences()
    result = token_loss(GSPO, AlgorithmConfig(), **inputs)
    (grad,) = torch.autograd.grad(result.loss.sum(), inputs["train_logprobs"])
    first = 2 * math.exp(0.3)
    expected = torch.tensor([[first, first, 0], [-1.0004] * 3, [0, 0, 0]], dtype=FP64)
    torch.testing.assert_close(result.loss.detach(), expected)
    torch.testing.assert_close(
        grad, torch.tensor([[first, first, 0], [0, 0, 0], [0, 0, 0]], dtype=FP64)
    )
    assert result.clipped.tolist() == [[False] * 3, [True] * 3, [False] * 3]
    torch.testing.assert_close(result.ratio[0, 0].item(), math.exp(0.3))
    assert result.weight[0].tolist() == [1.0, 1.0, 0.0]


def test_the_lower_bound_holds_a_sequence_that_became_unlikely() -> None:
    # s = e^-0.1 with A = -1: max(e^-0.1, 0.9997) = 0.9997, gradient 0.
    old = torch.tensor([[-1.0, -1.0]], dtype=FP64)
    train = (old + torch.tensor([[-0.2, 0.0]], dtype=FP64)).requires_grad_()
    result = token_loss(
        GSPO,
        AlgorithmConfig(),
        train_logprobs=train,
        old_logprobs=old,
        rollout_logprobs=old,
        advantages=torch.tensor([-1.0], dtype=FP64),
        mask=torch.ones(1, 2, dtype=torch.bool),
    )
    (grad,) = torch.autograd.grad(result.loss.sum(), train)
    torch.testing.assert_close(result.loss.detach(), torch.full((1, 2), 0.9997, dtype=FP64))
    assert not grad.any()


def test_its_gradient_is_that_of_the_sequence_level_objective() -> None:
    """1/S sum_i -clip(s_i) A_i with s_i = exp(mean log-ratio), differentiated through s_i."""
    wide = AlgorithmConfig(sequence_clip_low=0.9, sequence_clip_high=0.25)
    loss, grad = mean_loss(wide)
    inputs = sequences()
    total = torch.zeros((), dtype=FP64)
    for i, length in ((0, 2), (1, 3)):
        train, old = inputs["train_logprobs"][i, :length], inputs["old_logprobs"][i, :length]
        s, a = torch.exp((train - old).sum() / length), inputs["advantages"][i]
        total = total - torch.minimum(s * a, s.clamp(0.1, 1.25) * a) / 3
    (expected,) = torch.autograd.grad(total, inputs["train_logprobs"])
    torch.testing.assert_close(loss, total.detach())
    torch.testing.assert_close(grad, expected)
    # Sequence 0: s A / (S N) = 2 e^0.3 / 6 on each of two tokens; sequence 1: e^0.2 < 1.25.
    torch.testing.assert_close(grad[0, 0].item(), 2 * math.exp(0.3) / 6)
    torch.testing.assert_close(grad[1, 2].item(), -math.exp(0.2) / 9)


def test_a_sequence_of_one_token_is_ppo_with_the_same_bounds() -> None:
    whole = sequences()
    inputs = {name: whole[name].detach()[:, :1] for name in whole if name != "advantages"}
    inputs["advantages"] = whole["advantages"]
    constants = AlgorithmConfig(
        clip_low=0.1, clip_high=0.1, sequence_clip_low=0.1, sequence_clip_high=0.1
    )
    grads = []
    for row in (GSPO, ALGORITHMS["PPO"]):
        inputs["train_logprobs"] = inputs["train_logprobs"].detach().requires_grad_()
        result = token_loss(row, constants, **inputs)
        grads.append(torch.autograd.grad(result.loss.sum(), inputs["train_logprobs"])[0])
    torch.testing.assert_close(grads[0], grads[1])
    assert grads[0].any()


def test_before_an_update_its_gradient_is_the_plain_policy_gradient() -> None:
    inputs = sequences()
    inputs["old_logprobs"] = inputs["train_logprobs"].detach().clone()
    plain = dataclasses.replace(ALGORITHMS["PG-Seq-IS"], correction="none")
    grads = []
    for row in (GSPO, plain):
        result = token_loss(row, AlgorithmConfig(), **inputs)
        grads.append(torch.autograd.grad(result.loss.sum(), inputs["train_logprobs"])[0])
    assert torch.equal(*grads)
    assert grads[0].any()


def test_the_engines_log_probs_are_not_used() -> None:
    inputs = sequences()
    expected = token_loss(GSPO, AlgorithmConfig(), **inputs)
    inputs["rollout_logprobs"] = torch.full((3, 3), -0.01, dtype=FP64)
    assert torch.equal(token_loss(GSPO, AlgorithmConfig(), **inputs).loss, expected.loss)
