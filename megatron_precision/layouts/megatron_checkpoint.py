"""Megatron's `torch_dist` checkpoints: their tensors, as boxes of Hugging Face tensors.

`megatron.core.dist_checkpointing` stores a model by names and shapes that no layout shows in:
layers are stacked along a first axis, experts along a second, tensor-parallel shards are joined.
So a checkpoint that was written at any TP, PP and EP loads at any other. This module says, for a
`ModelConfig`, which tensors such a checkpoint holds and where each Hugging Face tensor lies in
them; it needs neither torch nor Megatron.

The names are those of Transformer Engine's layer spec. The local spec of `actor/models.py` maps
its own to them, as Megatron's does; other writers' unmapped ones are in `ALIASES`.

The vocabulary is stored without padding: Megatron loads embeddings of another padded size.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from megatron_precision.config.schema import ModelConfig
from megatron_precision.layouts.megatron import (
    ShardCoordinates,
    megatron_parameters,
    megatron_regions,
)
from megatron_precision.layouts.regions import Region

# What a local layer spec without Megatron's key map writes: the norm's own name.
ALIASES = {
    "decoder.layers.self_attention.linear_qkv.layer_norm_weight": (
        "decoder.layers.input_layernorm.weight"
    ),
    "decoder.layers.mlp.linear_fc1.layer_norm_weight": "decoder.layers.pre_mlp_layernorm.weight",
}
_STACKED = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(linear_fc[12])\.weight(\d+)")


@dataclass(frozen=True)
class Slot:
    """A layer's or expert's part of a stacked tensor, or a whole tensor that is not stacked.

    Attributes:
        key: the tensor's name in the checkpoint.
        index: its place along the stacked axes: (), (layer,) or (layer, expert).
        shape: of the part, without the stacked axes.
        stack: sizes of the stacked axes.
        regions: what it holds, of Hugging Face tensors.
    """

    key: str
    index: tuple[int, ...]
    shape: tuple[int, ...]
    stack: tuple[int, ...]
    regions: tuple[Region, ...]

    @property
    def global_shape(self) -> tuple[int, ...]:
        """The shape of the checkpoint's tensor."""
        return (*self.stack, *self.shape)

    @property
    def extra_states(self) -> list[str]:
        """Name the empty states that modules ask for beside this slot when they load.

        Megatron's linear layers have one each; Transformer Engine's norms and attention too. Other
        layer specs leave them alone.
        """
        module, _, kind = self.key.rpartition(".")
        if kind != "weight" or not re.search(r"linear_\w+$|layernorm$", module):
            return []  # Transformer Engine's fused norms are part of their linear layer
        modules = [module]
        if module.endswith("self_attention.linear_proj"):
            modules.append(module.replace("linear_proj", "core_attention"))
        at = (".".join(map(str, axes)) for axes in (self.index or (0,), self.stack or (1,)))
        shard = "_".join(("shard", *at))
        return [f"{name}._extra_state/{shard}" for name in modules]


@dataclass(frozen=True)
class RowRun:
    """A run of rows that are consecutive in a Hugging Face tensor and in a slot.

    Attributes:
        hf_row: the first, in the Hugging Face tensor.
        slot_row: the first, in the slot.
        rows: how many.
    """

    hf_row: int
    slot_row: int
    rows: int

    def within(self, begin: int, end: int) -> RowRun | None:
        """Return the part in the rows `[begin, end)` of the Hugging Face tensor."""
        first, last = max(begin, self.hf_row), min(end, self.hf_row + self.rows)
        if first >= last:
            return None
        return RowRun(first, self.slot_row + first - self.hf_row, last - first)


def row_runs(slot: Slot, region: Region) -> list[RowRun]:
    """List the runs of rows of a slot's region, in order: one, or one per KV group."""
    leading = len(region.row_sizes)
    if region.shape[1:] != slot.shape[1:]:
        raise ValueError(f"{region.hf_name}: rows of {region.shape[1:]}, not of {slot.shape[1:]}")
    *outer, (begin, end) = region.index[:leading]
    found: list[RowRun] = []
    row = 0
    for at in itertools.product(*(range(*span) for span in outer)):
        first = 0
        for place, size in zip((*at, begin), region.view[:leading], strict=True):
            first = first * size + place
        last = found[-1] if found else None
        if last is not None and last.slot_row + last.rows == first:
            found[-1] = RowRun(last.hf_row, last.slot_row, last.rows + end - begin)
        else:
            found.append(RowRun(row, first, end - begin))
        row += end - begin
    return found


def slots(model: ModelConfig) -> list[Slot]:
    """Yield every part of every tensor of the checkpoint, from the first layer to the last."""
    return [
        _slot(name, shape, model) for name, shape in megatron_parameters(model, model.vocab_size)
    ]


def _slot(name: str, shape: tuple[int, ...], model: ModelConfig) -> Slot:
    regions = tuple(megatron_regions(name, shape, model, ShardCoordinates()))
    layer = _STACKED.fullmatch(name)
    if layer is None:
        return Slot(name, (), shape, (), regions)
    if expert := _EXPERT.fullmatch(layer[2]):
        key = f"decoder.layers.mlp.experts.experts.{expert[1]}.weight"
        index = (int(layer[1]), int(expert[2]))
        return Slot(key, index, shape, (model.num_hidden_layers, model.num_experts), regions)
    key = f"decoder.layers.{layer[2]}"
    return Slot(key, (int(layer[1]),), shape, (model.num_hidden_layers,), regions)
