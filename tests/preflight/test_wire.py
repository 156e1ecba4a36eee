"""Bytes of a sync against plans that are counted message by message."""

from __future__ import annotations

import dataclasses
import time

import pytest

import recipes
from megatron_precision.config.schema import ModelConfig, ParallelConfig, RunConfig, SyncConfig
from megatron_precision.preflight import wire
from megatron_precision.sync.families import RolloutLayout, TrainerLayout
from megatron_precision.sync.plan import Planner
from megatron_precision.sync.traffic import traffic

DENSE = ModelConfig(
    vocab_size=1003, hidden_size=96, intermediate_size=160, num_hidden_layers=4,
    num_attention_heads=8, num_key_value_heads=4, head_dim=32,
)  # fmt: skip
MOE = dataclasses.replace(
    DENSE, model_type="qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=64
)
TIED = dataclasses.replace(DENSE, model_type="llama", tie_word_embeddings=True)


@pytest.mark.parametrize(
    ("model", "layout", "per_node"),
    [
        (DENSE, ParallelConfig(8, 4, 1, rollout_tp_size=2), 8),
        (DENSE, ParallelConfig(16, 2, 2, rollout_tp_size=8), 4),
        (TIED, ParallelConfig(8, 1, 4, rollout_tp_size=4), 2),
        (MOE, ParallelConfig(16, 4, 2, 4, 1, True, 8), 8),
        (MOE, ParallelConfig(8, 2, 2, 2, 2, True, 4), 4),
        (MOE, ParallelConfig(16, 4, 1, 4, 1, True, 2), 4),
        (MOE, ParallelConfig(2, 1, 1, 2, rollout_tp_size=2), 2),
    ],
)
def test_bytes_of_a_sync_are_those_of_the_plan(
    model: ModelConfig, layout: ParallelConfig, per_node: int
) -> None:
    config = RunConfig("test", model=model, parallel=layout)
    found = wire.of_run(config, per_node)
    trainer = TrainerLayout(
        layout.world_size, layout.tp_size, layout.pp_size, layout.ep_size, layout.etp_size
    )
    engine = RolloutLayout(layout.world_size, layout.rollout_tp_size)
    counted = traffic(Planner(model, trainer, engine, per_node), 2, 2**26)
    assert found.weights == counted.model_bytes
    assert found.copied == sum(rank.copied for rank in counted.ranks)
    assert found.received == sum(rank.received for rank in counted.ranks)
    assert found.network == sum(rank.from_network for rank in counted.ranks)
    assert found.rank_received == max(rank.received for rank in counted.ranks)
    assert found.node_network == max(entered for entered, _ in counted.network.values())
    assert found.exact


def test_equal_layouts_of_a_dense_model_send_nothing() -> None:
    found = wire.of_run(recipes.build("dense14b.dapo"), 8)
    assert found.received == 0
    # 14,768,307,200 weights of two bytes; norms are on each of 8 ranks.
    norms = 40 * (2 * 5120 + 2 * 128) + 5120
    assert found.weights == 2 * 14_768_307_200
    assert found.copied == 2 * (14_768_307_200 + 7 * norms)


def test_main_copies_are_counted_as_if_no_rank_had_any_and_called_a_bound() -> None:
    config = recipes.build("dense14b.dapo")
    found = wire.of_run(dataclasses.replace(config, sync=SyncConfig("main_copies")), 8)
    assert not found.exact
    assert found.copied == 0
    assert found.received == wire.of_run(config, 8).copied


def test_a_thousand_ranks_take_no_time() -> None:
    layout = ParallelConfig(1024, 4, 4, 8, 1, True, 8)
    config = dataclasses.replace(recipes.build("moe.grpo_seq_mis"), parallel=layout)
    begin = time.process_time()
    wire.of_run(config, 8)
    assert time.process_time() - begin < 2
