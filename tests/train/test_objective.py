"""The loss of a mini-batch: by hand, and the same however it is cut into micro-batches."""

from __future__ import annotations

import math

import pytest
import torch

from megatron_precision.actor.batch import Batch, make_batch
from megatron_precision.config.schema import AlgorithmConfig
from megatron_precision.rl.algorithms import ALGORITHMS
from megatron_precision.train.objective import policy_objective, supervised_objective

LIMIT = 10


def make() -> tuple[Batch, torch.Tensor]:
    """Five rollouts of 3, 1, 0, 5 and 2 tokens, and train_logprobs that are not old_logprobs."""
    generator = torch.Generator().manual_seed(2)
    lengths = (3, 1, 0, 5, 2)
    rollout = [(-torch.rand(n, generator=generator) - 0.1).tolist() for n in lengths]
    batch = make_batch(
        [[1, 2], [3], [4, 5], [6], [7]],
        [[9] * n for n in lengths],
        rollout,
        torch.tensor([1.0, -0.5, 2.0, -1.5, 0.25]),
    )
    noise = 0.4 * torch.randn(batch.tokens.shape, generator=generator)
    mask = batch.response_mask
    batch = batch.with_old_logprobs((batch.rollout_logprobs + 0.1 * noise) * mask)
    return batch, ((batch.rollout_logprobs + noise) * mask).requires_grad_(True)


def evaluated(name: str, cuts: list[list[int]]) -> tuple[float, torch.Tensor, dict, dict]:  # type: ignore[type-arg]
    """Loss, gradient, sums and maxima over the whole mini-batch, cut as given."""
    batch, logprobs = make()
    rows = torch.arange(len(batch))
    loss = policy_objective(ALGORITHMS[name], AlgorithmConfig(name), batch, rows, LIMIT)
    total = torch.zeros(())
    sums: dict[str, float] = {}
    maxima: dict[str, float] = {}
    for cut in cuts:
        micro = loss(batch.select(torch.tensor(cut), 6), logprobs[cut], torch.ones(len(cut), 1))
        total = total + micro.loss
        for key, value in micro.sums.items():
            sums[key] = sums.get(key, 0.0) + value
        for key, value in micro.maxima.items():
            maxima[key] = max(maxima.get(key, -math.inf), value)
    total.backward()
    assert logprobs.grad is not None
    return float(total.detach()), logprobs.grad, sums, maxima


@pytest.mark.parametrize("name", ALGORITHMS)
@pytest.mark.parametrize(
    "cuts", [[[0], [1], [2], [3], [4]], [[3, 0], [4, 1, 2]], [[2], [0, 1, 3, 4]]]
)
def test_the_loss_does_not_depend_on_the_micro_batches(name: str, cuts: list[list[int]]) -> None:
    whole, cut = evaluated(name, [[0, 1, 2, 3, 4]]), evaluated(name, cuts)
    assert cut[0] == pytest.approx(whole[0], rel=1e-5)
    torch.testing.assert_close(cut[1], whole[1], rtol=1e-6, atol=0)
    assert cut[2] == pytest.approx(whole[2], rel=1e-6)
    assert cut[3] == pytest.approx(whole[3], rel=1e-6)


def test_ppo_is_the_clipped_loss_over_sequences_times_the_limit() -> None:
    batch, logprobs = make()
    assert batch.old_logprobs is not None
    total, clipped = 0.0, 0
    largest = 0.0
    for row, t in batch.response_mask.nonzero().tolist():
        ratio = math.exp(float(logprobs[row, t].detach()) - float(batch.old_logprobs[row, t]))
        advantage = float(batch.advantages[row])
        bounded = min(max(ratio, 0.8), 1.28)
        total -= min(ratio * advantage, bounded * advantage)
        clipped += bounded * advantage < ratio * advantage
        largest = max(largest, ratio)
    loss, _, sums, maxima = evaluated("PPO", [[0, 1, 2, 3, 4]])
    # The sequence without a token counts in the five.
    assert loss == pytest.approx(total / (5 * LIMIT), rel=1e-5)
    assert sums["tokens"] == 11
    assert sums["clipped"] == clipped > 0
    assert maxima["ratio"] == pytest.approx(largest, rel=1e-5)


def test_the_warm_start_minimises_cross_entropy_per_response_token() -> None:
    batch, logprobs = make()
    loss = supervised_objective(batch)
    parts = [
        loss(batch.select(torch.tensor(cut), 6), logprobs[cut], torch.zeros(1)).loss
        for cut in ([0, 3], [1, 2, 4])
    ]
    assert float(sum(parts).detach()) == pytest.approx(-float(logprobs.detach().sum()) / 11)


def test_before_an_update_the_old_logprobs_are_the_steps_own() -> None:
    """The batch's, left zero there, are not read: the ratio is one, the gradient the same."""
    batch, logprobs = make()
    rows = torch.arange(len(batch))
    arguments = (ALGORITHMS["PPO"], AlgorithmConfig("PPO"), batch, rows, LIMIT)
    own = policy_objective(*arguments, before_update=True)(
        batch, logprobs, torch.ones(len(batch), 1)
    )
    (gradient,) = torch.autograd.grad(own.loss, logprobs)
    given = batch.with_old_logprobs(logprobs.detach().clone())
    other = policy_objective(*arguments)(given, logprobs, torch.ones(len(batch), 1))
    (expected,) = torch.autograd.grad(other.loss, logprobs)
    assert torch.equal(gradient, expected)
    assert float(gradient.abs().max()) > 0
    assert own.maxima["ratio"] == 1.0
    assert own.sums["ratio"] == float(batch.response_mask.sum())


def test_the_share_that_a_correction_cuts_is_counted_over_tokens_and_sequences() -> None:
    # pi_old/mu of the sequences of 3, 1, 5 and 2 tokens: 4 each token, 1, 1, and 6 and 1.
    batch, logprobs = make()
    assert batch.old_logprobs is not None
    shift = torch.zeros_like(logprobs)
    first, last = batch.response_mask[0].nonzero().flatten(), batch.response_mask[4].nonzero()
    shift[0, first], shift[4, last[0]] = math.log(4.0), math.log(6.0)
    batch = batch.with_old_logprobs(batch.rollout_logprobs + shift)
    counted = {}
    for name in ("PPO-Token-TIS", "PPO-Token-IcePop", "PPO-Seq-MIS", "PPO"):
        loss = policy_objective(
            ALGORITHMS[name], AlgorithmConfig(name), batch, torch.arange(len(batch)), LIMIT
        )
        sums = loss(batch, logprobs, torch.ones(len(batch), 1)).sums
        assert (sums["tokens"], sums["sequences"]) == (11, 4)
        counted[name] = (sums["cut_tokens"], sums["cut_sequences"], sums["correction"])
    # Weights over 11 tokens: 4, 4, 4, 6 and seven times 1.
    assert counted["PPO-Token-TIS"] == pytest.approx((4, 2, 4 * 3 + 7))  # 4 and 6 are above 3
    assert counted["PPO-Token-IcePop"] == pytest.approx((1, 1, 3 * 4 + 7))  # 6 is above 5
    assert counted["PPO-Seq-MIS"] == pytest.approx((5, 2, 6))  # rho 64 and 6; 1 + 5 tokens stay
    assert counted["PPO"] == (0, 0, 11)


def test_the_largest_factor_on_a_gradient_has_the_ratio_where_the_loss_has_one() -> None:
    batch, logprobs = make()
    assert batch.old_logprobs is not None
    mask = batch.response_mask
    ratio = (logprobs.detach() - batch.old_logprobs)[mask].exp().max()
    rho = ((logprobs.detach() - batch.rollout_logprobs) * mask).sum(1).exp()[mask.any(1)].max()
    for name, expected in (("PPO", ratio), ("PG-Seq-IS", rho)):
        _, _, _, maxima = evaluated(name, [[0, 1, 2, 3, 4]])
        assert maxima["weight"] == pytest.approx(float(expected), rel=1e-5)
