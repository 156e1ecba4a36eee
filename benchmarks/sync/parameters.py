"""What one rank of a layout holds: every parameter, its shape and its regions.

From the layout alone, without an engine. A run asks its live modules.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace

from megatron_precision.config.schema import ModelConfig
from megatron_precision.layouts.megatron import (
    ShardCoordinates,
    megatron_parameters,
    megatron_regions,
    padded_vocab_size,
)
from megatron_precision.layouts.regions import Region
from megatron_precision.layouts.vllm import vllm_parameters, vllm_regions
from megatron_precision.sync.families import RolloutLayout, TrainerLayout

_EXPERT = re.compile(r"\.experts\.linear_fc[12]\.weight(\d+)$")


@dataclass(frozen=True)
class RankParameter:
    """One parameter of a rank.

    Attributes:
        name: the rank's own; layers and experts are counted from its first.
    """

    name: str
    shape: tuple[int, ...]
    regions: list[Region]


def trainer_coordinates(model: ModelConfig, layout: TrainerLayout, rank: int) -> ShardCoordinates:
    """Where a trainer's rank stands."""
    stage, within = divmod(rank - layout.first, layout.size // layout.pp)
    ep_rank = within // layout.etp % layout.ep
    return ShardCoordinates(
        tp_rank=within % layout.tp,
        tp_size=layout.tp,
        etp_rank=within % layout.etp,
        etp_size=layout.etp,
        first_expert=ep_rank * (model.num_experts // layout.ep),
        first_layer=stage * (model.num_hidden_layers // layout.pp),
    )


def trainer_parameters(
    model: ModelConfig, layout: TrainerLayout, rank: int
) -> Iterator[RankParameter]:
    """A trainer's rank, by Transformer Engine's names.

    The copy of a tied embedding on the last pipeline stage is left out: no sync reads it.
    """
    at = trainer_coordinates(model, layout, rank)
    layers = model.num_hidden_layers // layout.pp
    first, last = at.first_layer == 0, at.first_layer + layers == model.num_hidden_layers
    rows = padded_vocab_size(model.vocab_size, layout.tp) // layout.tp
    stage = replace(model, num_hidden_layers=layers)
    for name, shape in megatron_parameters(stage, rows, layout.tp, layout.etp):
        expert = _EXPERT.search(name)
        if expert and int(expert[1]) >= model.num_experts // layout.ep:
            continue
        if not first and name.startswith("embedding."):
            continue
        if not last and name.startswith(("decoder.final_layernorm.", "output_layer.")):
            continue
        yield RankParameter(name, shape, megatron_regions(name, shape, model, at))


def engine_coordinates(model: ModelConfig, layout: RolloutLayout, rank: int) -> ShardCoordinates:
    """Where an engine's rank stands."""
    position = (rank - layout.first) % layout.tp
    if layout.expert_parallel:
        first_expert = position * (model.num_experts // layout.tp)
        return ShardCoordinates(position, layout.tp, 0, 1, first_expert)
    return ShardCoordinates(position, layout.tp, position, layout.tp)


def engine_parameters(
    model: ModelConfig, layout: RolloutLayout, rank: int
) -> Iterator[RankParameter]:
    """An engine's rank."""
    at = engine_coordinates(model, layout, rank)
    for name, shape in vllm_parameters(model, layout.tp, at.etp_size):
        if layout.expert_parallel and name.endswith(("w13_weight", "w2_weight")):
            shape = (shape[0] // layout.tp, *shape[1:])
        yield RankParameter(name, shape, vllm_regions(name, shape, model, at))
