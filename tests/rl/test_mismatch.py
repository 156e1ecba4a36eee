"""Mismatch statistics against closed forms: exact KL, a constant shift, a Gaussian shift."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_precision.rl.mismatch import MismatchStats, mismatch_stats

LENGTHS = torch.tensor([4, 1, 7])
MASK = torch.arange(7)[None, :] < LENGTHS[:, None]


def engine_logprobs(dtype: torch.dtype = torch.float64) -> Tensor:
    """Log-probs of mu, [3, 7], between -3.1 and -0.1."""
    generator = torch.Generator().manual_seed(2)
    return (-0.1 - 3.0 * torch.rand(3, 7, generator=generator, dtype=torch.float64)).to(dtype)


def test_two_sequences_by_hand() -> None:
    # Sequence 0: mu = 1/2, 1/4; pi = 1/4, 1/4; d = -ln 2, 0; D = -ln 2.
    # Sequence 1: mu = 1/8; pi = 1/2; d = ln 4 = 2 ln 2; D = 2 ln 2.
    mu = torch.tensor([[0.5, 0.25], [0.125, 0.7]], dtype=torch.float64)
    pi = torch.tensor([[0.25, 0.25], [0.5, 0.1]], dtype=torch.float64)
    stats = mismatch_stats(
        old_logprobs=pi.log(),
        rollout_logprobs=mu.log(),
        mask=torch.tensor([[True, True], [True, False]]),
    )
    ln2 = math.log(2.0)
    assert stats.k1_kl == pytest.approx(-ln2 / 3)  # (ln 2 + 0 - 2 ln 2) / 3
    # e^d = 1/2, 1, 4: (1/2 - 1 + ln 2) + 0 + (4 - 1 - 2 ln 2) = 2.5 - ln 2, over 3 tokens
    assert stats.k3_kl == pytest.approx((2.5 - ln2) / 3)
    assert stats.abs_diff_mean == pytest.approx(ln2)  # (1 + 0 + 2) ln 2 / 3
    assert stats.abs_diff_max == pytest.approx(2 * ln2)
    assert stats.prob_diff_max == pytest.approx(0.375)  # 1/2 - 1/8; the other is 1/4
    assert stats.seq_log_ratio_mean == pytest.approx(ln2 / 2)  # (-1 + 2) ln 2 / 2
    assert stats.seq_log_ratio_std == pytest.approx(1.5 * ln2)  # both are 1.5 ln 2 from the mean
    # w = 1/2, 4: (4.5)^2 / (2 * (1/4 + 16)) = 20.25 / 32.5
    assert stats.ess == pytest.approx(20.25 / 32.5)
    # exp(-D/N): exp(ln(2)/2) = sqrt 2 and exp(-2 ln 2) = 1/4
    assert stats.ppl_ratio == pytest.approx((math.sqrt(2.0) + 0.25) / 2)
    assert stats.num_tokens == 3
    assert stats.seq_log_ratios == pytest.approx([-ln2, 2 * ln2])


def test_k1_and_k3_are_kl_from_the_engine_to_the_trainer() -> None:
    """Tokens drawn in mu's own proportions give KL(mu || pi) exactly, and not KL(pi || mu)."""
    mu = torch.tensor([4 / 8, 3 / 8, 1 / 8], dtype=torch.float64)
    pi = torch.tensor([1 / 8, 2 / 8, 5 / 8], dtype=torch.float64)
    tokens = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2]])
    stats = mismatch_stats(
        old_logprobs=pi.log()[tokens],
        rollout_logprobs=mu.log()[tokens],
        mask=torch.ones(1, 8, dtype=torch.bool),
    )
    kl = 4 / 8 * math.log(4) + 3 / 8 * math.log(1.5) + 1 / 8 * math.log(0.2)
    reverse = 1 / 8 * math.log(1 / 4) + 2 / 8 * math.log(2 / 3) + 5 / 8 * math.log(5)
    assert stats.k1_kl == pytest.approx(kl)
    assert stats.k3_kl == pytest.approx(kl)
    assert abs(kl - reverse) > 0.05


@pytest.mark.parametrize("d", [-0.7, -1e-3, 0.02, 0.4])
def test_constant_shift(d: float) -> None:
    """pi = mu e^d on every token: the lengths are 4, 1 and 7."""
    mu = engine_logprobs()
    stats = mismatch_stats(old_logprobs=mu + d, rollout_logprobs=mu, mask=MASK)
    assert stats.k1_kl == pytest.approx(-d)
    assert stats.k3_kl == pytest.approx(math.expm1(d) - d, rel=1e-9, abs=0)
    assert stats.abs_diff_mean == pytest.approx(abs(d))
    assert stats.abs_diff_max == pytest.approx(abs(d))
    assert stats.prob_diff_max == pytest.approx(mu[MASK].exp().max().item() * abs(math.expm1(d)))
    assert stats.seq_log_ratios == pytest.approx([4 * d, d, 7 * d])
    assert stats.seq_log_ratio_mean == pytest.approx(4 * d)
    assert stats.seq_log_ratio_std == pytest.approx(abs(d) * math.sqrt((0 + 9 + 9) / 3))
    weights = [math.exp(4 * d), math.exp(d), math.exp(7 * d)]
    assert stats.ess == pytest.approx(sum(weights) ** 2 / (3 * sum(w * w for w in weights)))
    assert stats.ppl_ratio == pytest.approx(math.exp(-d))
    assert stats.num_tokens == 12


def test_gaussian_shift() -> None:
    """d at 20,000 quantiles of N(m, s^2), one token a sequence, so that D = d.

    k1 = -m, k3 = e^(m + s^2/2) - 1 - m, E|d| of a shifted normal, ess = e^(-s^2) and
    ppl_ratio = E[e^-d] = e^(-m + s^2/2).
    """
    m, s, num_seqs = -0.05, 0.3, 20_000
    quantiles = [NormalDist(m, s).inv_cdf((i + 0.5) / num_seqs) for i in range(num_seqs)]
    d = torch.tensor(quantiles, dtype=torch.float64)[:, None]
    mu = torch.full((num_seqs, 1), -2.0, dtype=torch.float64)
    stats = mismatch_stats(
        old_logprobs=mu + d, rollout_logprobs=mu, mask=torch.ones(num_seqs, 1, dtype=torch.bool)
    )
    folded = math.sqrt(2 / math.pi) * s * math.exp(-(m**2) / (2 * s**2))
    abs_mean = folded + m * (1 - 2 * NormalDist().cdf(-m / s))
    assert stats.k1_kl == pytest.approx(-m, rel=1e-6)
    assert stats.k3_kl == pytest.approx(math.exp(m + s * s / 2) - 1 - m, rel=1e-3)
    assert stats.abs_diff_mean == pytest.approx(abs_mean, rel=1e-3)
    assert stats.seq_log_ratio_std == pytest.approx(s, rel=1e-3)
    assert stats.ess == pytest.approx(math.exp(-s * s), rel=1e-3)
    assert stats.ppl_ratio == pytest.approx(math.exp(-m + s * s / 2), rel=1e-3)


@pytest.mark.parametrize("d", [1e-3, 1e-5, -1e-5, 1e-7])
def test_k3_of_a_tiny_shift_is_not_rounding_noise(d: float) -> None:
    # e^d - 1 - d = d^2/2 + d^3/6 + d^4/24 + ...: 5e-11 for 1e-5, where exp(d) - 1 - d in FP64
    # has lost all but 6 digits, and 5e-15 for 1e-7, where it has 2 left.
    shape = (2, 3)
    mask = torch.ones(shape, dtype=torch.bool)
    stats = mismatch_stats(
        old_logprobs=torch.full(shape, d, dtype=torch.float64),
        rollout_logprobs=torch.zeros(shape, dtype=torch.float64),
        mask=mask,
    )
    assert stats.k3_kl == pytest.approx(d * d / 2 + d**3 / 6 + d**4 / 24, rel=1e-8, abs=0)


def test_fp32_inputs_are_compared_in_fp64() -> None:
    """One FP32 unit in the last place of one token among 12 is seen exactly."""
    mu = engine_logprobs(torch.float32)
    pi = mu.clone()
    pi[2, 5] = torch.nextafter(mu[2, 5], torch.tensor(0.0))
    gap = pi[2, 5].item() - mu[2, 5].item()
    stats = mismatch_stats(old_logprobs=pi, rollout_logprobs=mu, mask=MASK)
    assert gap > 0
    assert stats.abs_diff_max == gap
    assert stats.k1_kl == pytest.approx(-gap / 12, rel=1e-12, abs=0)
    assert stats.k3_kl == pytest.approx(gap**2 / 24, rel=1e-6, abs=0)
    assert stats.seq_log_ratios == [0.0, 0.0, gap]


def test_equal_policies_do_not_differ() -> None:
    mu = engine_logprobs()
    stats = mismatch_stats(old_logprobs=mu.clone(), rollout_logprobs=mu, mask=MASK)
    assert stats == MismatchStats(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 12, [0.0, 0.0, 0.0])


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (2, 3)])
def test_a_batch_without_response_tokens_is_defined(shape: tuple[int, int]) -> None:
    nothing = torch.full(shape, math.nan)
    stats = mismatch_stats(
        old_logprobs=nothing,
        rollout_logprobs=nothing,
        mask=torch.zeros(shape, dtype=torch.bool),
    )
    assert stats == MismatchStats(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 0, [])


def test_empty_sequences_are_left_out() -> None:
    mu = engine_logprobs()
    with_empty = MASK.clone()
    with_empty[1] = False
    stats = mismatch_stats(old_logprobs=mu + 0.1, rollout_logprobs=mu, mask=with_empty)
    kept = [0, 2]
    assert stats == mismatch_stats(
        old_logprobs=mu[kept] + 0.1, rollout_logprobs=mu[kept], mask=MASK[kept]
    )
    assert len(stats.seq_log_ratios) == 2


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf])
def test_padding_is_not_read(garbage: float) -> None:
    mu = engine_logprobs()
    pi = mu - 0.01 * mu
    clean = mismatch_stats(old_logprobs=pi, rollout_logprobs=mu, mask=MASK)
    dirty = mismatch_stats(
        old_logprobs=pi.masked_fill(~MASK, garbage),
        rollout_logprobs=mu.masked_fill(~MASK, garbage),
        mask=MASK,
    )
    assert dirty == clean


def test_log_ratios_far_beyond_exp_keep_the_effective_sample_size() -> None:
    # D = 2000 and 2000 - ln 3: w is 1 and 1/3 after a common factor; (4/3)^2 / (2 * 10/9) = 0.8.
    num_tokens = 1000
    mu = torch.full((2, num_tokens), -3.0, dtype=torch.float64)
    pi = mu + 2.0
    pi[1, 0] -= math.log(3.0)
    stats = mismatch_stats(
        old_logprobs=pi,
        rollout_logprobs=mu,
        mask=torch.ones(2, num_tokens, dtype=torch.bool),
    )
    assert stats.seq_log_ratios == pytest.approx([2000.0, 2000.0 - math.log(3.0)])
    assert stats.ess == pytest.approx(0.8)


@settings(max_examples=60, deadline=None)
@given(
    d=st.lists(st.floats(-3.0, 3.0), min_size=12, max_size=12),
    lengths=st.lists(st.integers(0, 4), min_size=3, max_size=3).filter(any),
)
def test_bounds_hold_for_any_shift(d: list[float], lengths: list[int]) -> None:
    mask = torch.arange(4)[None, :] < torch.tensor(lengths)[:, None]
    mu = torch.full((3, 4), -4.0, dtype=torch.float64)
    pi = mu + torch.tensor(d, dtype=torch.float64).reshape(3, 4)
    stats = mismatch_stats(old_logprobs=pi, rollout_logprobs=mu, mask=mask)
    num_seqs = len(stats.seq_log_ratios)
    assert stats.k3_kl >= 0.0
    assert stats.abs_diff_mean <= stats.abs_diff_max * (1 + 1e-12)
    assert abs(stats.k1_kl) <= stats.abs_diff_mean * (1 + 1e-12)
    assert 1.0 / num_seqs - 1e-12 <= stats.ess <= 1.0 + 1e-12
    assert 0.0 <= stats.prob_diff_max <= 1.0
    assert num_seqs == sum(length > 0 for length in lengths)
    assert stats.num_tokens == sum(lengths)


def test_metrics_bear_the_names_of_the_contract() -> None:
    stats = mismatch_stats(
        old_logprobs=engine_logprobs() + 0.1, rollout_logprobs=engine_logprobs(), mask=MASK
    )
    metrics = stats.metrics()
    assert set(metrics) == {
        "mismatch/k1_kl",
        "mismatch/k3_kl",
        "mismatch/abs_diff_mean",
        "mismatch/abs_diff_max",
        "mismatch/prob_diff_max",
        "mismatch/seq_log_ratio_mean",
        "mismatch/seq_log_ratio_std",
        "mismatch/ess",
        "mismatch/ppl_ratio",
        "mismatch/num_tokens",
        "mismatch/seq_log_ratios",
    }
    ratios = metrics.pop("mismatch/seq_log_ratios")
    assert isinstance(ratios, list)
    assert all(isinstance(value, (int, float)) for value in [*metrics.values(), *ratios])


def test_every_log_prob_that_is_not_finite_is_reported() -> None:
    mu, pi = engine_logprobs(), engine_logprobs()
    pi[0, 2] = math.nan
    mu[2, 0] = -math.inf
    mu[2, 6] = math.nan
    with pytest.raises(ValueError, match="not finite") as raised:
        mismatch_stats(old_logprobs=pi, rollout_logprobs=mu, mask=MASK)
    assert "old_logprobs: 1 response tokens, the first at [sequence, token] [0, 2]" in str(
        raised.value
    )
    assert "rollout_logprobs: 2 response tokens, the first at [sequence, token] [2, 0]" in str(
        raised.value
    )


def test_shapes_that_would_broadcast_are_refused() -> None:
    mu = engine_logprobs()
    with pytest.raises(ValueError, match="three of the same shape"):
        mismatch_stats(old_logprobs=mu, rollout_logprobs=mu[:, :1], mask=MASK)
    with pytest.raises(ValueError, match=r"the mask of torch\.bool"):
        mismatch_stats(old_logprobs=mu, rollout_logprobs=mu, mask=MASK.double())
