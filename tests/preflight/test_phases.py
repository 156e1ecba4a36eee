"""What is where in which phase, as the loop of this version works."""

from __future__ import annotations

import dataclasses

import pytest

import recipes
from megatron_precision.config.schema import RunConfig, SyncConfig, TrainConfig
from megatron_precision.preflight import memory


def test_every_part_has_a_state_in_every_phase_and_nothing_is_moved() -> None:
    config = recipes.build("dense14b.dapo")
    found = memory.states(config)
    assert set(found) == {part.name for part in dataclasses.fields(memory.Memory)}
    comes_and_goes = {part for part, row in found.items() if "freed" in row.values()}
    assert comes_and_goes == {"activations", "logits", "engine_workspace"}
    for row in found.values():
        assert list(row) == ["training", "sync", "rollout"]
        assert "used" in row.values()
    rank = memory.of_run(config)
    assert memory.needed(config, rank) == rank.total
    assert all(size < rank.total for size in memory.totals(config, rank).values())


def test_a_sync_of_main_copies_reads_the_optimizer() -> None:
    config = recipes.build("dense14b.dapo")
    assert memory.states(config)["optimizer"]["sync"] == "kept"
    config = dataclasses.replace(config, sync=SyncConfig("main_copies"))
    assert memory.states(config)["optimizer"]["sync"] == "used"


def test_dumps_copy_the_parameters_of_small_models_alone() -> None:
    config = recipes.build("sanity.tiny_dense")
    rank = memory.of_run(config)
    assert memory.dump_copy_bytes(config, rank, 2**30) == rank.parameters
    assert memory.dump_copy_bytes(config, rank, 2**30 + 1) == 0
    never = dataclasses.replace(config, train=TrainConfig(dump_jump_factor=0.0))
    assert memory.dump_copy_bytes(never, rank, 1) == 0


HANDED_OVER = [
    ("off", False, {}),
    ("keep_weights", False, {"engine_weights": ("host", "used"), "kv_cache": ("gone", "used")}),
    ("drop_weights", True, {"engine_weights": ("gone", "used"), "optimizer": ("used", "host")}),
]


@pytest.mark.parametrize(("sleep", "offload", "expected"), HANDED_OVER)
def test_what_sleeps_in_training_and_is_aside_in_the_rollout(
    sleep: str, offload: bool, expected: dict[str, tuple[str, str]]
) -> None:
    config = handed_over(sleep, offload)
    found = memory.states(config)
    for part, (training, rollout) in expected.items():
        assert (found[part]["training"], found[part]["rollout"]) == (training, rollout)
    # Both sides hold weights at the sync, and no KV cache unless nothing sleeps.
    assert {found[part]["sync"] for part in ("parameters", "engine_weights")} == {"used"}
    assert found["kv_cache"]["sync"] == ("kept" if sleep == "off" else "gone")


def test_the_largest_phase_counts_where_memory_is_handed_over() -> None:
    config = handed_over("drop_weights", True)
    rank = memory.of_run(config)
    fixed = rank.sync_buffers + rank.reserve
    trainer = rank.parameters + rank.gradients + rank.optimizer
    by_hand = {
        "training": trainer + rank.activations + rank.logits + fixed,
        "sync": trainer + rank.engine_weights + fixed,
        "rollout": rank.engine_weights + rank.kv_cache + rank.engine_workspace + fixed,
    }
    assert memory.totals(config, rank) == by_hand
    assert memory.needed(config, rank) == max(by_hand.values()) < rank.total
    # Gradients are made anew; parameters and optimizer wait on the host.
    assert memory.host_bytes(config, 0) == rank.parameters + rank.optimizer
    kept = handed_over("keep_weights", False)
    assert memory.host_bytes(kept, 0) == rank.engine_weights


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_an_offloaded_share_of_the_optimizer_is_on_the_host(share: float) -> None:
    config = recipes.build("dense14b.dapo")
    whole = memory.of_run(config).optimizer
    saved = dataclasses.replace(config.memory, optimizer_offload=share)
    moved = dataclasses.replace(config, memory=saved)
    assert memory.of_run(moved).optimizer == pytest.approx(whole * (1 - share))
    assert memory.host_bytes(moved, 0) == pytest.approx(whole * share)


def handed_over(sleep: str, offload: bool) -> RunConfig:
    words = [f"memory.engine_sleep={sleep}", f"memory.offload_trainer={str(offload).lower()}"]
    return recipes.build("dense14b.dapo", overrides=words)
