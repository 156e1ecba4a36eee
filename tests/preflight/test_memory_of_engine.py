"""The plan against a real vLLM engine and a real sync on two ranks: weights, cache and messages.

Not covered: the engine's workspace, and anything on a GPU.
"""

from __future__ import annotations

import functools
import tempfile

import pytest

from megatron_precision.preflight import memory, wire
from tests.distributed.engine_worlds import config, weights
from tests.distributed.harness import run_distributed

WORLDS = ("dense bf16", "MoE bf16")
worlds = pytest.mark.parametrize("world", WORLDS)
pytestmark = pytest.mark.slow


@functools.cache
def held(world: str) -> list[dict[str, int]]:
    with tempfile.TemporaryDirectory() as folder:
        found: list[dict[str, int]] = run_distributed(
            "engine_memory_bodies.engine_footprint",
            2,
            config(world),
            weights(world.split()[0]),
            folder,
        )
    return found


@worlds
def test_weights_of_every_rank_are_those_that_were_planned(world: str) -> None:
    plan = memory.of_run(config(world))
    assert [rank["weights"] for rank in held(world)] == [plan.engine_weights] * 2


@worlds
def test_the_cache_is_what_it_was_told_to_be_but_for_part_of_a_block(world: str) -> None:
    plan = memory.of_run(config(world))
    block = 128 * memory.kv_token_bytes(config(world))
    for rank in held(world):
        assert 0 <= plan.kv_cache - rank["kv_cache"] < block


@worlds
def test_a_sync_moves_what_was_planned_through_buffers_no_larger(world: str) -> None:
    plan, moved = memory.of_run(config(world)), wire.of_run(config(world), 2)
    ranks = held(world)
    assert sum(rank["copied"] for rank in ranks) == moved.copied
    assert sum(rank["received"] for rank in ranks) == moved.received
    assert max(rank["received"] for rank in ranks) == moved.rank_received
    assert all(rank["buffers"] <= plan.sync_buffers for rank in ranks)
