"""What the constants of an algorithm must satisfy. This module imports no torch."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_precision.config import RunConfig
from megatron_precision.errors import Problem
from megatron_precision.rl.algorithms import ALGORITHMS


def problems(config: RunConfig) -> Iterator[Problem]:
    """Constants of `config.algo` outside of their limits, and what the row cannot work with."""
    algo = config.algo
    agreement = "the weight of a token on which engine and trainer agree is 1, and must stay"
    for name, expected, fits in (
        ("clip_low", "less than 1", algo.clip_low < 1),
        ("sequence_clip_low", "less than 1", algo.sequence_clip_low < 1),
        ("dual_clip", "0, or more than 1", algo.dual_clip == 0 or algo.dual_clip > 1),
        ("correction_threshold", f"1 or more: {agreement}", algo.correction_threshold >= 1),
        ("token_mask_low", f"at most 1: {agreement}", algo.token_mask_low <= 1),
        ("token_mask_high", f"1 or more: {agreement}", algo.token_mask_high >= 1),
        ("overlong_buffer_share", "at most 1", algo.overlong_buffer_share <= 1),
    ):
        if not fits:
            yield Problem("value out of range", f"algo.{name}", str(getattr(algo, name)), expected)
    row = ALGORITHMS.get(algo.name)
    if row and row.dynamic_sampling and config.train.rollouts_per_prompt == 1:
        yield Problem(
            what="dynamic sampling looks for groups whose rewards differ",
            where="train.rollouts_per_prompt",
            got=f"1 with algo.name={algo.name}",
            expected="2 or more",
        )
