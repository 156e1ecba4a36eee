"""What is where in which phase, as the loop of this version works."""

from __future__ import annotations

import dataclasses

import recipes
from megatron_precision.config import SyncConfig, TrainConfig
from megatron_precision.planning import memory, phases


def test_every_part_has_a_state_in_every_phase_and_nothing_is_moved() -> None:
    config = recipes.build("dense14b.dapo")
    found = phases.states(config)
    assert set(found) == {part.name for part in dataclasses.fields(memory.Memory)}
    comes_and_goes = {part for part, row in found.items() if "freed" in row.values()}
    assert comes_and_goes == {"activations", "logits", "engine_workspace"}
    for row in found.values():
        assert list(row) == ["training", "sync", "rollout"]
        assert "used" in row.values()
    rank = memory.of_run(config)
    assert phases.needed(config, rank) == rank.total
    assert all(size < rank.total for size in phases.totals(config, rank).values())


def test_a_sync_of_main_copies_reads_the_optimizer() -> None:
    config = recipes.build("dense14b.dapo")
    assert phases.states(config)["optimizer"]["sync"] == "kept"
    config = dataclasses.replace(config, sync=SyncConfig("main_copies"))
    assert phases.states(config)["optimizer"]["sync"] == "used"


def test_dumps_copy_the_parameters_of_small_models_alone() -> None:
    config = recipes.build("sanity.tiny_dense")
    rank = memory.of_run(config)
    assert phases.dump_copy_bytes(config, rank, 2**30) == rank.parameters
    assert phases.dump_copy_bytes(config, rank, 2**30 + 1) == 0
    never = dataclasses.replace(config, train=TrainConfig(dump_jump_factor=0.0))
    assert phases.dump_copy_bytes(never, rank, 1) == 0
