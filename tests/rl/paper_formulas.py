"""The published losses in plain Python floats, one token at a time: an oracle for tests.

Written from the formulas of the sources by the names of the algorithms; it knows nothing of the
parts that the package composes them from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

C = 3.0
LOW, HIGH = 0.8, 1.28
GSPO_LOW, GSPO_HIGH = 1 - 3e-4, 1 + 4e-4


@dataclass(frozen=True)
class Ratios:
    """What the formulas of one token read."""

    r: float  # pi_theta / pi_old
    w: float  # pi_old / mu
    rho: float  # prod pi_old / mu
    rho_theta: float  # prod pi_theta / mu
    s: float  # exp(mean log(pi_theta / pi_old))
    log_pi: float


def _clipped(r: float, low: float, high: float, a: float) -> tuple[float, float]:
    """max(-r A, -clip(r) A), and its derivative by log r; equal branches count as unclipped."""
    unclipped, clipped = -r * a, -min(max(r, low), high) * a
    return (unclipped, unclipped) if unclipped >= clipped else (clipped, 0.0)


def _token(name: str, x: Ratios, a: float) -> tuple[float, float]:
    ppo = _clipped(x.r, LOW, HIGH, a)
    pg = (-a * x.log_pi, -a)
    weight, base = {
        "PPO": (1.0, ppo),
        "DAPO": (1.0, ppo),
        "PPO-Token-TIS": (min(x.w, C), ppo),
        "PPO-Token-IcePop": (x.w if 0.5 <= x.w <= 5.0 else 0.0, ppo),
        "PPO-Seq-TIS": (min(x.rho, C), ppo),
        "PPO-Seq-MIS": (x.rho if x.rho <= C else 0.0, ppo),
        "PG-Seq-IS": (x.rho_theta, pg),
        "PG-Seq-TIS": (min(x.rho_theta, C), pg),
        "PG-Seq-MIS": (x.rho_theta if x.rho_theta <= C else 0.0, pg),
        "Vanilla-GSPO": (1.0, _clipped(x.s, GSPO_LOW, GSPO_HIGH, a)),
    }[name]
    return weight * base[0], weight * base[1]


def loss_and_gradient(name: str, inputs: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Token losses and their derivative by train_logprobs, both [num_seqs, num_tokens] FP64."""
    train, old, rollout = (
        inputs[side].detach().double().tolist()
        for side in ("train_logprobs", "old_logprobs", "rollout_logprobs")
    )
    loss = torch.zeros(inputs["mask"].shape, dtype=torch.float64)
    grad = torch.zeros_like(loss)
    for i, a in enumerate(inputs["advantages"].double().tolist()):
        counted = [t for t, counts in enumerate(inputs["mask"][i].tolist()) if counts]
        num_tokens = max(1, len(counted))
        rho = math.exp(min(sum(old[i][t] - rollout[i][t] for t in counted), 20.0))
        rho_theta = math.exp(min(sum(train[i][t] - rollout[i][t] for t in counted), 20.0))
        s = math.exp(sum(train[i][t] - old[i][t] for t in counted) / num_tokens)
        for t in counted:
            r, w = math.exp(train[i][t] - old[i][t]), math.exp(old[i][t] - rollout[i][t])
            ratios = Ratios(r, w, rho, rho_theta, s, train[i][t])
            loss[i, t], grad[i, t] = _token(name, ratios, a)
    return loss, grad
