"""The table of algorithms fits the functions that implement its parts."""

from __future__ import annotations

from typing import get_args

from megatron_precision.config import AlgorithmConfig
from megatron_precision.rl.algorithms import ALGORITHMS, Correction, PolicyLoss
from megatron_precision.rl.correction import CORRECTIONS
from megatron_precision.rl.losses import POLICY_LOSSES


def test_every_part_that_a_row_can_name_has_a_function() -> None:
    assert set(POLICY_LOSSES) == set(get_args(PolicyLoss))
    assert set(CORRECTIONS) == set(get_args(Correction))


def test_rows_stand_under_their_own_names() -> None:
    assert all(name == row.name for name, row in ALGORITHMS.items())


def test_the_default_algorithm_exists() -> None:
    assert AlgorithmConfig().name in ALGORITHMS


def test_only_ppo_needs_the_forward_only_pass() -> None:
    needs = {name: row.needs_old_logprobs for name, row in ALGORITHMS.items()}
    assert needs == {"PPO": True, "PG-Seq-IS": False}
