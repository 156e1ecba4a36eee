"""Layouts of both sides, in the large: which ranks of a cluster hold which box of a tensor.

Tensors that differ in layer or expert alone are one *family*: they have one shape and are divided
alike. A family's boxes are read from the tables of regions once, for one layer and one expert; who
holds them for a given layer and expert is arithmetic. So a plan for a thousand ranks looks at a
few dozen boxes, and not at the regions of a thousand ranks.

Plain integers throughout: neither torch nor an engine is needed.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from megatron_precision.config.schema import ModelConfig
from megatron_precision.layouts.architectures import hf_shapes
from megatron_precision.layouts.megatron import (
    ShardCoordinates,
    megatron_parameters,
    megatron_regions,
    padded_vocab_size,
)
from megatron_precision.layouts.regions import Box, Region
from megatron_precision.layouts.vllm import vllm_parameters, vllm_regions


@dataclass(frozen=True)
class Instance:
    """A tensor of a family.

    Attributes:
        layer: its layer; None where it belongs to none.
        expert: its expert; None where it belongs to none.
    """

    layer: int | None = None
    expert: int | None = None


@dataclass(frozen=True)
class Family:
    """Tensors that differ only in layer or expert.

    Attributes:
        template: the Hugging Face name, with `{layer}` and `{expert}`.
        shape: of each.
    """

    template: str
    shape: tuple[int, ...]

    def name(self, at: Instance) -> str:
        """Return the Hugging Face name of one tensor."""
        return self.template.format(layer=at.layer, expert=at.expert)

    def count(self, model: ModelConfig) -> int:
        """The number of tensors."""
        layers = model.num_hidden_layers if "{layer}" in self.template else 1
        return layers * (model.num_experts if "{expert}" in self.template else 1)

    def instances(self, model: ModelConfig) -> Iterator[Instance]:
        """Yield all tensors, by layer and expert."""
        layers: Sequence[int | None] = [None]
        experts: Sequence[int | None] = [None]
        if "{layer}" in self.template:
            layers = range(model.num_hidden_layers)
        if "{expert}" in self.template:
            experts = range(model.num_experts)
        for layer in layers:
            for expert in experts:
                yield Instance(layer, expert)


def families(model: ModelConfig) -> list[Family]:
    """List the families of a model."""
    one = dataclasses.replace(model, num_hidden_layers=1)
    templates = ((_template(name), shape) for name, shape in hf_shapes(one).items())
    return [Family(template, shape) for template, shape in templates if template]


def _template(name: str) -> str:
    """Return the family of a tensor of the first layer and expert; None for others."""
    if re.search(r"experts\.[1-9]", name):
        return ""
    return name.replace("experts.0.", "experts.{expert}.").replace("layers.0.", "layers.{layer}.")


@dataclass(frozen=True)
class Shard:
    """A box that some positions of a side's grid have.

    Attributes:
        region: where it lies in a parameter of the first of them.
        positions: tensor-parallel ranks, or expert-tensor-parallel ones.
    """

    region: Region
    positions: tuple[int, ...]

    @property
    def box(self) -> Box:
        """The box, in the coordinates of the Hugging Face tensor."""
        return Box(self.region.start, self.region.shape)


Shards = dict[str, list[Shard]]
# (stage, expert-parallel rank, whether of the experts' grid, positions)
Group = tuple[int, int, bool, tuple[int, ...]]


class Side(Protocol):
    """A trainer's or an engine's layout over ranks of the world."""

    def shards(self, model: ModelConfig) -> Shards:
        """Return each family's distinct boxes, by its template."""
        ...

    def group(self, model: ModelConfig, at: Instance, shard: Shard) -> Group:
        """Name the group of ranks that have a box of a tensor; many boxes share one group."""
        ...

    def ranks(self, group: Group) -> tuple[int, ...]:
        """Return the ranks of a group, in ascending order."""
        ...

    @property
    def world(self) -> range:
        """All ranks of this side."""
        ...


@dataclass(frozen=True)
class TrainerLayout:
    """Megatron's grid, in its default order: tensor, expert, data, then pipeline parallel.

    Attributes:
        first: its first rank in the world.
        size: its ranks.
    """

    size: int
    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1
    first: int = 0

    @property
    def world(self) -> range:
        """All ranks of the trainer."""
        return range(self.first, self.first + self.size)

    def shards(self, model: ModelConfig) -> Shards:
        """Return each family's distinct boxes, by its template."""
        rows = padded_vocab_size(model.vocab_size, self.tp) // self.tp
        one = dataclasses.replace(model, num_hidden_layers=1)
        found: dict[str, dict[Box, tuple[Region, list[int]]]] = {}
        for tp_rank in range(self.tp):
            at = ShardCoordinates(tp_rank=tp_rank, tp_size=self.tp)
            for name, shape in megatron_parameters(one, rows, self.tp, self.etp):
                if ".experts." not in name:
                    _add(found, megatron_regions(name, shape, model, at), tp_rank)
        for etp_rank in range(self.etp if model.num_experts else 0):
            at = ShardCoordinates(etp_rank=etp_rank, etp_size=self.etp)
            for name, shape in megatron_parameters(one, rows, self.tp, self.etp):
                if ".experts." in name:
                    _add(found, megatron_regions(name, shape, model, at), etp_rank)
        return _shards(found)

    def group(self, model: ModelConfig, at: Instance, shard: Shard) -> Group:
        """Name the group of ranks that have a box of a tensor."""
        if at.layer is None:
            stage = 0 if shard.region.hf_name == "model.embed_tokens.weight" else self.pp - 1
        else:
            stage = at.layer // (model.num_hidden_layers // self.pp)
        if at.expert is None:
            return stage, 0, False, shard.positions
        return stage, at.expert // (model.num_experts // self.ep), True, shard.positions

    def ranks(self, group: Group) -> tuple[int, ...]:
        """Return the ranks of a group, in ascending order."""
        stage, ep_rank, experts, positions = group
        tp, ep = (self.etp, self.ep) if experts else (self.tp, 1)
        replicas = self.size // (tp * ep * self.pp)
        return tuple(
            sorted(
                self.first + position + tp * (ep_rank + ep * (replica + replicas * stage))
                for replica in range(replicas)
                for position in positions
            )
        )


@dataclass(frozen=True)
class RolloutLayout:
    """Replicas of an engine, each over `tp` neighbouring ranks.

    Attributes:
        first: its first rank in the world.
        size: its ranks.
        expert_parallel: experts are divided over a replica's ranks whole, and not each over all.
    """

    size: int
    tp: int = 1
    expert_parallel: bool = False
    first: int = 0

    @property
    def world(self) -> range:
        """All ranks of the engines."""
        return range(self.first, self.first + self.size)

    def shards(self, model: ModelConfig) -> Shards:
        """Return each family's distinct boxes, by its template."""
        one = dataclasses.replace(model, num_hidden_layers=1)
        found: dict[str, dict[Box, tuple[Region, list[int]]]] = {}
        for rank in range(self.tp):
            etp_rank, etp_size = (0, 1) if self.expert_parallel else (rank, self.tp)
            at = ShardCoordinates(rank, self.tp, etp_rank, etp_size)
            for name, shape in vllm_parameters(one, self.tp, at.etp_size):
                _add(found, vllm_regions(name, shape, model, at), rank)
        return _shards(found)

    def group(self, model: ModelConfig, at: Instance, shard: Shard) -> Group:
        """Name the group of ranks that have a box of a tensor."""
        if at.expert is not None and self.expert_parallel:
            return 0, 0, True, (at.expert // (model.num_experts // self.tp),)
        return 0, 0, False, shard.positions

    def ranks(self, group: Group) -> tuple[int, ...]:
        """Return the ranks of a group, in ascending order."""
        return tuple(
            self.first + replica * self.tp + position
            for replica in range(self.size // self.tp)
            for position in group[-1]
        )


def _add(
    found: dict[str, dict[Box, tuple[Region, list[int]]]], regions: list[Region], position: int
) -> None:
    for region in regions:
        if not _template(region.hf_name):
            continue
        boxes = found.setdefault(_template(region.hf_name), {})
        boxes.setdefault(Box(region.start, region.shape), (region, []))[1].append(position)


def _shards(found: dict[str, dict[Box, tuple[Region, list[int]]]]) -> Shards:
    return {
        template: [Shard(region, tuple(positions)) for region, positions in boxes.values()]
        for template, boxes in found.items()
    }
