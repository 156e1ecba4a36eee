"""Tokens and operations against numbers worked by hand, and against published counts."""

from __future__ import annotations

import dataclasses

import pytest

import recipes
from megatron_precision.config.schema import MemoryConfig
from megatron_precision.layouts.architectures import QWEN3_14B, QWEN3_30B_A3B
from megatron_precision.preflight import work
from megatron_precision.preflight.work import Lengths


def test_weights_that_a_token_of_qwen3_14b_meets() -> None:
    # Queries, keys and values, 5,120 × 128 × (40 + 2 × 8); the output, 40 × 128 × 5,120; the MLP.
    layer = 36_700_160 + 26_214_400 + 3 * 5_120 * 17_408
    assert work.layer_weights(QWEN3_14B) == 40 * layer == 13_212_057_600
    assert work.active_weights(QWEN3_14B) == 13_212_057_600 + 151_936 * 5_120
    # Qwen's model card: 13.2B parameters without embeddings, 14.8B with them.
    assert round(work.layer_weights(QWEN3_14B) / 1e9, 1) == 13.2
    assert round((work.active_weights(QWEN3_14B) + 151_936 * 5_120) / 1e9, 1) == 14.8


def test_weights_that_a_token_of_qwen3_30b_a3b_meets() -> None:
    # Attention as above; a router of 128 rows; 8 of 128 experts.
    layer = 2_048 * 128 * (32 + 2 * 4) + 32 * 128 * 2_048 + 2_048 * 128 + 8 * 3 * 2_048 * 768
    assert work.layer_weights(QWEN3_30B_A3B) == 48 * layer == 2_730_491_904
    active = work.active_weights(QWEN3_30B_A3B) + 151_936 * 2_048  # the embedding, looked up
    # Qwen's model card says 3.3B; 3,352,821,760 is within 2 % of it.
    assert active == 3_352_821_760
    assert active == pytest.approx(3.3e9, rel=0.02)


def test_operations_of_a_token_are_six_a_weight_and_the_attention() -> None:
    # 6 × 13,989,969,920, and 6 × 40 layers × 40 heads × 128 × 22,528 tokens.
    by_hand = 83_939_819_520 + 27_682_406_400
    assert work.training_flops(QWEN3_14B, 22_528) == by_hand
    # Chowdhery et al. count all of the attention: 12 L H d T.
    unmasked = work.training_flops(QWEN3_14B, 22_528, masked=False)
    assert unmasked == 83_939_819_520 + 2 * 27_682_406_400
    # 6 × 3,041,656,832, and 6 × 48 × 32 × 128 × 22,528.
    assert work.training_flops(QWEN3_30B_A3B, 22_528) == 18_249_940_992 + 26_575_110_144


def test_an_iteration_of_the_dense_recipe_worked_by_hand() -> None:
    config = recipes.build("dense14b.dapo")
    done = work.of_iteration(config, Lengths(500, 5_000), 3)
    assert (done.sampled_sequences, done.trained_sequences) == (3 * 512 * 16, 512 * 16)
    assert done.sampled_tokens == 24_576 * 5_000
    assert done.trained_tokens == 8_192 * 5_500
    token = 6 * 13_989_969_920 + 6 * 40 * 5_120 * 5_500
    assert done.training_flops == 8_192 * 5_500 * token
    # A third of it forward; 15 of 16 mini-batches; layers again without the LM head.
    assert done.old_logprobs_flops == pytest.approx(8_192 * 5_500 * token / 3 * 15 / 16)
    assert done.recomputed_flops == 8_192 * 5_500 * (2 * 13_212_057_600 + 2 * 40 * 5_120 * 5_500)
    # A token of a response has the prompt and half of the response before it.
    decoded = 2 * 13_989_969_920 + 4 * 40 * 5_120 * 3_000
    assert done.decode_flops == 24_576 * 5_000 * decoded
    assert done.prefill_flops == 24_576 * 500 * (2 * 13_212_057_600 + 4 * 40 * 5_120 * 250)
    assert done.flops == pytest.approx(
        done.prefill_flops + done.decode_flops + done.training_flops
        + done.old_logprobs_flops + done.recomputed_flops
    )  # fmt: skip


def test_passes_are_counted_where_the_run_makes_them() -> None:
    config = recipes.build("moe.pg_seq_tis")  # no pass of its own
    lengths = Lengths(500, 5_000)

    def done(**changes: object) -> work.Work:
        return work.of_iteration(dataclasses.replace(config, **changes), lengths, 1)

    assert done().old_logprobs_flops == 0
    every = dataclasses.replace(config.train, mismatch_every=4)
    forward = done().training_flops / 3
    assert done(train=every).old_logprobs_flops == pytest.approx(forward * 15 / 16 / 4)
    assert done(memory=MemoryConfig("none", attention="fused")).recomputed_flops == 0
    attention = done().training_flops - 45_056_000 * 6 * work.active_weights(config.model)
    scores = done(memory=MemoryConfig("none", attention="scores")).training_flops
    assert scores - done().training_flops == pytest.approx(attention)
    cached = dataclasses.replace(config.rollout, prefix_caching=True)
    assert done(rollout=cached).prefill_flops == done().prefill_flops / 16
