"""Every element of the optimizer's state is written once and read where it belongs, at any layout.

The ranks are pretended, one after the other in this process; what a rank holds is by the layout
oracle, and optimizer ranges are cut as Megatron's distributed optimizer does, in the middle of
rows. `tests/train/test_resume_layouts.py` does it with real trainers.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks.sync.parameters import trainer_coordinates
from megatron_precision.actor.optimizer import FlatState
from megatron_precision.checkpoint import optimizer_state
from megatron_precision.checkpoint.optimizer_state import OptimizerBoxes
from megatron_precision.config.schema import ModelConfig
from megatron_precision.layouts.architectures import hf_shapes
from megatron_precision.layouts.megatron import megatron_regions
from megatron_precision.sync.families import TrainerLayout
from tests.distributed.layout_oracle import MODELS, numbered, trainer_rank

# Moments are told from main copies, and from each other.
FACTORS = {"param": 1.0, "exp_avg": 0.5, "exp_avg_sq": 0.25}
LAYOUTS = {
    "dense": [TrainerLayout(1), TrainerLayout(8, 2, 2), TrainerLayout(4, 4), TrainerLayout(6, 2)],
    "tied": [TrainerLayout(8, 2, 4), TrainerLayout(6, 1, 2), TrainerLayout(2, 2)],
    "qwen2": [TrainerLayout(4, 2), TrainerLayout(5), TrainerLayout(8, 8)],
    "MoE": [
        TrainerLayout(8, 2, 1, 4, 1), TrainerLayout(1), TrainerLayout(8, 1, 2, 2), TrainerLayout(3),
        TrainerLayout(8, 2, 1, 2, 2),
    ],
}  # fmt: skip


@dataclass
class Rank:
    """What `OptimizerBoxes` asks of an actor."""

    model_config: ModelConfig
    held: list[tuple[str, torch.nn.Parameter, list[Any]]]
    states: dict[torch.nn.Parameter, FlatState]

    @property
    def weights(self) -> Any:
        return SimpleNamespace(parameters=lambda: self.held)

    @property
    def optimizer(self) -> Any:
        return SimpleNamespace(flat_state=lambda parameter: self.states[parameter])


def replica(layout: TrainerLayout, rank: int, experts: bool) -> tuple[int, int]:
    """(place, number) of a rank among those that hold the same parameters."""
    within = rank % (layout.size // layout.pp)
    held_by = layout.etp * layout.ep if experts else layout.tp
    return within // held_by, layout.size // layout.pp // held_by


def pretended(model: ModelConfig, layout: TrainerLayout, rank: int, empty: bool) -> Rank:
    at = trainer_coordinates(model, layout, rank)
    made = Rank(model, [], {})
    tensors = trainer_rank(model, layout, rank).tensors
    sizes = {True: 0, False: 0}
    for name, tensor in tensors.items():
        sizes[".experts." in name] += tensor.numel()
    passed = {True: 0, False: 0}
    for name, tensor in tensors.items():
        experts = ".experts." in name
        place, replicas = replica(layout, rank, experts)
        share = -(-sizes[experts] // replicas)
        first, last = (
            min(max(edge - passed[experts], 0), tensor.numel())
            for edge in (place * share, (place + 1) * share)
        )
        passed[experts] += tensor.numel()
        flat = tensor.clamp(min=0).double().float().flatten()[first:last]  # no number for padding
        values = {n: torch.full_like(flat, -7.0) if empty else flat * f for n, f in FACTORS.items()}
        held = FlatState(first, last, values) if first < last else FlatState(0, 0, {})
        parameter = torch.nn.Parameter(torch.empty(tensor.shape))
        made.held.append((name, parameter, megatron_regions(name, tuple(tensor.shape), model, at)))
        made.states[parameter] = held
    return made


def boxes_of(
    monkeypatch: pytest.MonkeyPatch, model: ModelConfig, layout: TrainerLayout, empty: bool
) -> list[OptimizerBoxes]:
    """Every rank's, as if they had met in `all_gather_object`."""
    told: dict[int, Any] = {}
    now = [0]

    def gather(everyone: list[Any], mine: Any) -> None:
        told[now[0]] = mine
        everyone[:] = [told.get(rank, ()) for rank in range(layout.size)]

    monkeypatch.setattr(optimizer_state.dist, "get_rank", lambda: now[0])
    monkeypatch.setattr(optimizer_state.dist, "get_world_size", lambda: layout.size)
    monkeypatch.setattr(optimizer_state.dist, "all_gather_object", gather)
    ranks = [pretended(model, layout, rank, empty) for rank in range(layout.size)]
    for _ in range(2):  # in the second round every rank knows all
        found = []
        for now[0], rank in enumerate(ranks):
            found.append(OptimizerBoxes(rank))  # type: ignore[arg-type]
    return found


def written(boxes: list[OptimizerBoxes], model: ModelConfig) -> dict[str, torch.Tensor]:
    """Whole tensors from what all ranks write; every element exactly once."""
    whole = {
        f"optimizer.{name}.{hf_name}": torch.zeros(shape)
        for name in FACTORS
        for hf_name, shape in hf_shapes(model).items()
    }
    times = {key: torch.zeros(tensor.shape) for key, tensor in whole.items()}
    for rank in boxes:
        for sharded in rank.saved().values():
            assert sharded.global_shape == tuple(whole[sharded.key].shape)
            box = tuple(
                slice(a, a + n)
                for a, n in zip(sharded.global_offset, sharded.local_shape, strict=True)
            )
            whole[sharded.key][box] = sharded.data
            times[sharded.key][box] += 1
    assert all((count == 1).all() for count in times.values())
    return whole


@pytest.mark.parametrize("kind", list(LAYOUTS))
def test_every_element_is_written_once_where_the_hugging_face_tensor_has_it(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[kind]
    expected = {
        f"optimizer.{name}.{hf_name}": tensor.float() * factor
        for hf_name, tensor in numbered(model).items()
        for name, factor in FACTORS.items()
    }
    for layout in LAYOUTS[kind]:
        found = written(boxes_of(monkeypatch, model, layout, empty=False), model)
        assert found.keys() == expected.keys()
        assert [key for key in found if not torch.equal(found[key], expected[key])] == []


@pytest.mark.parametrize("kind", list(LAYOUTS))
def test_every_rank_of_every_layout_reads_its_own_ranges(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = MODELS[kind]
    whole = written(boxes_of(monkeypatch, model, LAYOUTS[kind][0], empty=False), model)
    for layout in LAYOUTS[kind]:
        for number, boxes in enumerate(boxes_of(monkeypatch, model, layout, empty=True)):
            loaded = {}
            for key, sharded in boxes.wanted(moments=True).items():
                box = tuple(
                    slice(a, a + n)
                    for a, n in zip(sharded.global_offset, sharded.local_shape, strict=True)
                )
                loaded[key] = whole[sharded.key][box]
            boxes.restore(loaded, moments=True)
            expected = pretended(model, layout, number, empty=False).states.values()
            for held, state in zip(boxes._held, expected, strict=True):
                assert held.state.tensors.keys() == state.tensors.keys()
                for name, values in state.tensors.items():
                    assert torch.equal(held.state.tensors[name], values), (layout, number, name)


def test_before_the_first_step_there_are_no_moments_to_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (boxes,) = boxes_of(monkeypatch, MODELS["dense"], TrainerLayout(1), empty=True)
    keys = {sharded.key.split(".")[1] for sharded in boxes.wanted(moments=False).values()}
    assert keys == {"param"}
