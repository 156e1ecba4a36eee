"""Corrections with thresholds: numbers by hand, bounds, and the limits in which they are one.

The formulas over random sequences are in test_losses.py.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_precision.config.schema import AlgorithmConfig
from megatron_precision.rl.algorithms import ALGORITHMS, Algorithm, Correction
from megatron_precision.rl.losses import TokenLoss, token_loss

PPO = ALGORITHMS["PPO"]
CONSTANTS = AlgorithmConfig(correction_threshold=3.0, token_mask_low=0.5, token_mask_high=5.0)
NO_THRESHOLD = dataclasses.replace(
    CONSTANTS, correction_threshold=1e30, token_mask_low=1e-30, token_mask_high=1e30
)
CORRECTED_PPO = ("PPO-Token-TIS", "PPO-Token-IcePop", "PPO-Seq-TIS", "PPO-Seq-MIS")
FP64 = torch.float64


def run(
    algorithm: Algorithm, inputs: dict[str, Tensor], constants: AlgorithmConfig = CONSTANTS
) -> tuple[TokenLoss, Tensor]:
    """The token losses and the gradient of their sum with respect to train_logprobs."""
    result = token_loss(algorithm, constants, **inputs)
    (grad,) = torch.autograd.grad(result.loss.sum(), inputs["train_logprobs"])
    return result, grad


def by_hand(
    train: Any, old: Any, mu: Any, advantages: Any, lengths: list[int]
) -> dict[str, Tensor]:
    """Inputs from probabilities."""
    train_logprobs = torch.tensor(train, dtype=FP64).log()
    return {
        "train_logprobs": train_logprobs.requires_grad_(),
        "old_logprobs": torch.tensor(old, dtype=FP64).log(),
        "rollout_logprobs": torch.tensor(mu, dtype=FP64).log(),
        "advantages": torch.tensor(advantages, dtype=FP64),
        "mask": torch.arange(len(train[0]))[None, :] < torch.tensor(lengths)[:, None],
    }


# pi_old/mu by token:  sequence 0: 2, 4 (rho 8)      sequence 1: 1/4, 2 (rho 1/2)
#                      sequence 2: 6, 1/3 (rho 2)    the third place of 0 and 2 is padding
# r = pi_theta/pi_old = 1 but for the first token of sequence 1, where it is 1.1.
OLD = [[0.5, 0.8, 0.9], [0.1, 0.4, 0.5], [0.6, 0.2, 0.9]]
MU = [[0.25, 0.2, 0.1], [0.4, 0.2, 0.5], [0.1, 0.6, 0.1]]
TRAIN = [[0.5, 0.8, 0.9], [0.11, 0.4, 0.5], [0.6, 0.2, 0.9]]
ADVANTAGES = [1.0, -2.0, 0.5]
LENGTHS = [2, 3, 2]
THIRD = 1.0 / 3.0


@pytest.mark.parametrize(
    ("name", "weight", "cut"),
    [
        # min(w, 3)
        (
            "PPO-Token-TIS",
            [[2.0, 3.0, 0.0], [0.25, 2.0, 1.0], [3.0, THIRD, 0.0]],
            [[0, 1, 0], [0, 0, 0], [1, 0, 0]],
        ),
        # w where 0.5 <= w <= 5, else 0
        (
            "PPO-Token-IcePop",
            [[2.0, 4.0, 0.0], [0.0, 2.0, 1.0], [0.0, 0.0, 0.0]],
            [[0, 0, 0], [1, 0, 0], [1, 1, 0]],
        ),
        # min(rho, 3): 8 -> 3, 1/4 * 2 * 1 = 1/2, 6 * 1/3 = 2
        (
            "PPO-Seq-TIS",
            [[3.0, 3.0, 0.0], [0.5, 0.5, 0.5], [2.0, 2.0, 0.0]],
            [[1, 1, 0], [0, 0, 0], [0, 0, 0]],
        ),
        # rho where rho <= 3: 8 -> 0
        (
            "PPO-Seq-MIS",
            [[0.0, 0.0, 0.0], [0.5, 0.5, 0.5], [2.0, 2.0, 0.0]],
            [[1, 1, 0], [0, 0, 0], [0, 0, 0]],
        ),
    ],
)
def test_weights_on_ppo_by_hand(name: str, weight: list[list[float]], cut: list[list[int]]) -> None:
    result, grad = run(ALGORITHMS[name], by_hand(TRAIN, OLD, MU, ADVANTAGES, LENGTHS))
    expected = torch.tensor(weight, dtype=FP64)
    torch.testing.assert_close(result.weight, expected)
    assert result.cut.int().tolist() == cut
    # No ratio leaves [0.8, 1.28], so that loss and gradient are both -w r A.
    ratio = torch.tensor([[1.0, 1.0, 1.0], [1.1, 1.0, 1.0], [1.0, 1.0, 1.0]], dtype=FP64)
    product = -expected * ratio * torch.tensor(ADVANTAGES, dtype=FP64)[:, None]
    torch.testing.assert_close(result.loss.detach(), product)
    torch.testing.assert_close(grad, product)
    torch.testing.assert_close(result.gradient_factor, (expected * ratio) * expected.ne(0))


@pytest.mark.parametrize(
    ("name", "weight", "cut"),
    [
        # rho_theta = prod pi_theta/mu: 8; 1.1 * 1/2 = 0.55; 2.
        ("PG-Seq-IS", [8.0, 0.55, 2.0], [0, 0, 0]),
        ("PG-Seq-TIS", [3.0, 0.55, 2.0], [1, 0, 0]),
        ("PG-Seq-MIS", [0.0, 0.55, 2.0], [1, 0, 0]),
    ],
)
def test_weights_on_the_policy_gradient_by_hand(
    name: str, weight: list[float], cut: list[int]
) -> None:
    inputs = by_hand(TRAIN, OLD, MU, ADVANTAGES, LENGTHS)
    result, grad = run(ALGORITHMS[name], inputs)
    each = torch.tensor(weight, dtype=FP64)[:, None] * inputs["mask"]
    torch.testing.assert_close(result.weight, each)
    assert result.cut.any(dim=1).int().tolist() == cut
    # -w A log pi_theta, whose derivative is -w A.
    torch.testing.assert_close(grad, -each * inputs["advantages"][:, None])
    log_pi = torch.tensor(TRAIN, dtype=FP64).log()
    torch.testing.assert_close(result.loss.detach(), -each * inputs["advantages"][:, None] * log_pi)
    torch.testing.assert_close(result.gradient_factor, each)


def test_above_the_threshold_mis_has_no_gradient_and_tis_has_a_bounded_one() -> None:
    # rho = 1e6 by one token: 0.5 / 5e-7.
    inputs = by_hand([[0.5, 0.5]], [[0.5, 0.5]], [[5e-7, 0.5]], [-1.0], [2])
    for name, expected in (("PPO-Seq-MIS", 0.0), ("PG-Seq-MIS", 0.0), ("PG-Seq-TIS", 3.0)):
        _, grad = run(ALGORITHMS[name], inputs)
        torch.testing.assert_close(grad, torch.full((1, 2), expected, dtype=FP64))


@pytest.mark.parametrize("name", ["PPO-Seq-MIS", "PG-Seq-MIS", "PPO-Token-IcePop"])
def test_a_weight_on_the_bound_is_kept(name: str) -> None:
    # The ratio is exactly 1, and so are the bounds.
    same = [[0.3, 0.7]]
    bounds = dataclasses.replace(
        CONSTANTS, correction_threshold=1.0, token_mask_low=1.0, token_mask_high=1.0
    )
    result, _ = run(ALGORITHMS[name], by_hand(same, same, same, [1.0], [2]), bounds)
    assert result.weight.tolist() == [[1.0, 1.0]]
    assert not result.cut.any()


def random_inputs(lengths: list[int], engine_noise: float) -> dict[str, Tensor]:
    """FP32 sequences whose pi_old is near pi_theta and whose mu is `engine_noise` away."""
    generator = torch.Generator().manual_seed(7)
    shape = (len(lengths), max(lengths))
    old = -3.0 * torch.rand(shape, generator=generator) - 0.1
    train = old + 0.2 * torch.randn(shape, generator=generator)
    return {
        "train_logprobs": train.requires_grad_(),
        "old_logprobs": old,
        "rollout_logprobs": old + engine_noise * torch.randn(shape, generator=generator),
        "advantages": torch.linspace(-1.0, 1.5, len(lengths)),
        "mask": torch.arange(shape[1])[None, :] < torch.tensor(lengths)[:, None],
    }


def assert_same(first: tuple[TokenLoss, Tensor], second: tuple[TokenLoss, Tensor]) -> None:
    assert torch.equal(first[0].loss, second[0].loss)
    assert torch.equal(first[0].weight, second[0].weight)
    assert torch.equal(first[1], second[1])
    assert first[1].any()


@pytest.mark.parametrize("name", CORRECTED_PPO)
def test_where_the_engine_is_pi_old_every_correction_of_ppo_is_ppo(name: str) -> None:
    inputs = random_inputs([6, 4, 1, 5], engine_noise=0.0)
    corrected = run(ALGORITHMS[name], inputs)
    assert_same(corrected, run(PPO, inputs))
    assert not corrected[0].cut.any()


@pytest.mark.parametrize(
    ("name", "limit"),
    [
        ("PPO-Seq-TIS", "seq_is"),
        ("PPO-Seq-MIS", "seq_is"),
        ("PG-Seq-TIS", "seq_is"),
        ("PG-Seq-MIS", "seq_is"),
        ("PPO-Token-IcePop", "token_tis"),
    ],
)
def test_without_a_threshold_truncation_and_mask_are_importance_weights(
    name: str, limit: Correction
) -> None:
    inputs = random_inputs([6, 4, 1, 5], engine_noise=1.5)
    row = ALGORITHMS[name]
    unbounded = run(dataclasses.replace(row, correction=limit), inputs, NO_THRESHOLD)
    assert_same(run(row, inputs, NO_THRESHOLD), unbounded)
    # With the threshold in force they are not: the limit is not an empty statement.
    assert not torch.equal(run(row, inputs)[1], unbounded[1])


def test_a_sequence_of_one_token_is_its_token() -> None:
    inputs = random_inputs([1, 1, 1, 1], engine_noise=1.5)
    assert_same(run(ALGORITHMS["PPO-Token-TIS"], inputs), run(ALGORITHMS["PPO-Seq-TIS"], inputs))


@pytest.mark.parametrize("kind", ["Seq-TIS", "Seq-MIS"])
def test_before_an_update_ppo_and_the_policy_gradient_are_corrected_alike(kind: str) -> None:
    # pi_theta = pi_old: rho = rho_theta, and PPO at r = 1 has the gradient of A log pi.
    inputs = random_inputs([6, 4, 1, 5], engine_noise=1.0)
    inputs["old_logprobs"] = inputs["train_logprobs"].detach().clone()
    _, ppo = run(ALGORITHMS[f"PPO-{kind}"], inputs)
    _, pg = run(ALGORITHMS[f"PG-{kind}"], inputs)
    assert torch.equal(ppo, pg)
    assert ppo.any()


def test_ppo_is_corrected_from_mu_to_pi_old_and_the_policy_gradient_to_pi_theta() -> None:
    # pi_theta/pi_old = 2, pi_old/mu = 1.25; A < 0, so that PPO does not clip.
    inputs = by_hand([[0.5]], [[0.25]], [[0.2]], [-1.0], [1])
    assert run(ALGORITHMS["PPO-Seq-TIS"], inputs)[0].weight.item() == pytest.approx(1.25)
    assert run(ALGORITHMS["PG-Seq-TIS"], inputs)[0].weight.item() == pytest.approx(2.5)


def test_the_clamp_brings_no_weight_back_under_its_bound() -> None:
    # log w = 30 is clamped to 20 for exp, and is still above C = e^25.
    inputs = by_hand([[0.5]], [[0.5]], [[0.5]], [1.0], [1])
    inputs["rollout_logprobs"] = inputs["old_logprobs"] - 30.0
    bound = dataclasses.replace(
        CONSTANTS, correction_threshold=math.exp(25.0), token_mask_high=math.exp(25.0)
    )
    for name in ("PPO-Seq-MIS", "PPO-Token-IcePop"):
        result, _ = run(ALGORITHMS[name], inputs, bound)
        assert (result.weight.item(), result.cut.item()) == (0.0, True)
    result, _ = run(ALGORITHMS["PPO-Seq-TIS"], inputs, bound)
    assert result.weight.item() == pytest.approx(math.exp(20.0))


@pytest.mark.parametrize("name", [*CORRECTED_PPO, "PG-Seq-IS", "PG-Seq-TIS", "PG-Seq-MIS"])
def test_a_long_masked_tail_does_not_change_a_sequences_weight(name: str) -> None:
    inputs = random_inputs([3, 2], engine_noise=1.0)
    padded = {
        side: torch.nn.functional.pad(inputs[side].detach(), (0, 40), value=-7.0)
        for side in ("train_logprobs", "old_logprobs", "rollout_logprobs")
    }
    padded["train_logprobs"].requires_grad_()
    padded["advantages"] = inputs["advantages"]
    padded["mask"] = torch.nn.functional.pad(inputs["mask"], (0, 40), value=False)
    short, grad = run(ALGORITHMS[name], inputs)
    long, long_grad = run(ALGORITHMS[name], padded)
    assert torch.equal(short.weight, long.weight[:, :3])
    assert torch.equal(grad, long_grad[:, :3])
    assert not long_grad[:, 3:].any()
