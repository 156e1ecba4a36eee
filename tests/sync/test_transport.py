"""Plans carried out by real processes over gloo."""

from __future__ import annotations

import pytest
import torch

from megatron_precision.sync.families import RolloutLayout, TrainerLayout
from megatron_precision.sync.plan import PlanError, Planner
from megatron_precision.sync.transport import Transport
from tests.distributed.harness import run_distributed
from tests.distributed.layout_oracle import MODELS, RankTensors, engine_rank, trainer_rank

# name → (model, ranks, trainer, engines, ranks a node)
CASES = {
    "TP2 to TP1": ("dense", 2, TrainerLayout(2, tp=2), RolloutLayout(2, 1), 2),
    "TP1 to TP2": ("qwen2", 2, TrainerLayout(2), RolloutLayout(2, 2), 2),
    "PP2 to TP2": ("tied", 2, TrainerLayout(2, pp=2), RolloutLayout(2, 2), 2),
    "EP2 to TP2": ("MoE", 2, TrainerLayout(2, ep=2), RolloutLayout(2, 2), 2),
    "EP2 to EP2": ("MoE", 2, TrainerLayout(2, ep=2), RolloutLayout(2, 2, True), 2),
    "TP2 DP2 to DP4": ("dense", 4, TrainerLayout(4, tp=2), RolloutLayout(4, 1), 2),
    "one trainer, an engine apart": (
        "MoE", 2, TrainerLayout(1), RolloutLayout(1, 1, first=1), 1,
    ),
    "two trainers, a node of engines apart": (
        "dense", 4, TrainerLayout(2, tp=2), RolloutLayout(2, 1, first=2), 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", list(CASES))
def test_engines_get_the_trainers_numbers(name: str) -> None:
    kind, ranks, trainer, rollout, per_node = CASES[name]
    planner = Planner(MODELS[kind], trainer, rollout, per_node, cell_elements=500)
    body = "transport_bodies.run_plan"
    found = run_distributed(body, ranks, planner, torch.float32, 4096)
    assert [rank["wrong"] for rank in found] == [0] * ranks
    assert [rank["compared"] > 0 for rank in found] == [r in rollout.world for r in range(ranks)]
    # Small messages: their buffers stay small.
    assert max(rank["buffers"] for rank in found) <= 2 * 4096
    received = found[0]["received"]
    assert 0 <= received["by plan"] <= received["full gather"]


def test_a_gather_that_leaves_a_weight_out_is_no_comparison() -> None:
    planner = Planner(MODELS["dense"], TrainerLayout(2, tp=2), RolloutLayout(2, 1), 2)
    message = run_distributed("transport_bodies.lossy_gather", 2, planner)
    assert "full gather: 8 regions differ" in message
    assert "down_proj" in message


def test_engines_of_another_layout_are_refused_with_both_layouts() -> None:
    """Each holds twice as much as was planned for: half of it would stay as it was."""
    planner = Planner(MODELS["dense"], TrainerLayout(2), RolloutLayout(2, 2), 2)
    message = run_distributed("transport_bodies.other_layout", 2, planner, RolloutLayout(2, 1))
    assert "model.layers.0.self_attn.o_proj.weight: the plan covers 96 of 192 elements" in message
    assert "... and 20 more" in message  # 4 x 7 divided tensors of layers, embedding and head
    assert "TrainerLayout(size=2, tp=1" in message
    assert "RolloutLayout(size=2, tp=2" in message
    assert run_distributed("transport_bodies.other_layout", 2, planner, planner.rollout) == ""


def test_a_layout_that_was_not_planned_for_is_refused() -> None:
    model = MODELS["dense"]
    plan = Planner(model, TrainerLayout(1), RolloutLayout(1)).rank_plan(0)
    source = trainer_rank(model, TrainerLayout(1), 0)
    other: RankTensors = engine_rank(model, RolloutLayout(2, 2), 0)
    with pytest.raises(PlanError, match="its layout is not the one that was planned for"):
        Transport(
            [plan],
            [(region, source.tensors[region.parameter]) for region in source.regions],
            [(region, other.tensors[region.parameter]) for region in other.regions],
            wire=torch.float32,
            world_size=1,
        )
