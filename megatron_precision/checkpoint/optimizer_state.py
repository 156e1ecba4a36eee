"""Writes and reads main copies and moments as boxes of Hugging Face tensors, at any layout.

Megatron's distributed optimizer divides all parameters, laid end to end, over the data-parallel
ranks. Its own formats store that division (`dp_reshardable`: the same TP, PP and EP again), or
gather a model-parallel shard in FP32 on one rank first (`fully_reshardable`, whose loading needs a
state that torch's AdamW does not have). Here every rank stores its own range, cut where rows and
other ranks' ranges end (`sync/flat_ranges.py`), under

    optimizer.{param,exp_avg,exp_avg_sq}.<Hugging Face name>

in that tensor's own coordinates. Of replicas, the lowest rank writes. Nothing is gathered, and a
rank of another layout reads the boxes of its own ranges.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_precision.actor.actor import Actor
from megatron_precision.actor.optimizer import MAIN, FlatState
from megatron_precision.layouts.architectures import hf_shapes
from megatron_precision.layouts.regions import Box, Region
from megatron_precision.sync.flat_ranges import FlatRange, FlatRanges

MOMENTS = ("exp_avg", "exp_avg_sq")
State = dict[str, ShardedTensor]


@dataclass(frozen=True)
class _Held:
    """A parameter of this rank, and the boxes that its range consists of.

    Attributes:
        number: of the parameter.
        shape: of the parameter.
        state: the range.
        parts: (region, its part, whether this rank writes it).
    """

    number: int
    shape: torch.Size
    state: FlatState
    parts: list[tuple[Region, Box, bool]]

    def key(self, name: str, part: int) -> str:
        """Name a part of one of this rank's states."""
        return f"{name}.{self.number}.{part}"


class OptimizerBoxes:
    """This rank's part of the optimizer's state; every rank makes one for every use."""

    def __init__(self, actor: Actor) -> None:
        self._shapes = hf_shapes(actor.model_config)
        parameters = list(actor.weights.parameters())
        states = [actor.optimizer.flat_state(parameter) for _, parameter, _ in parameters]
        mine = tuple(
            FlatRange(region.hf_name, region.start, state.begin, state.end)
            for (_, _, regions), state in zip(parameters, states, strict=True)
            for region in regions
        )
        everyone: list[tuple[FlatRange, ...]] = [()] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        ranges = FlatRanges(tuple(everyone))
        where: dict[tuple[str, tuple[int, ...]], list[int]] = {}
        for rank, held in enumerate(everyone):
            for part in held:
                where.setdefault((part.hf_name, part.start), []).append(rank)
        me = dist.get_rank()
        self._held: list[_Held] = []
        for (_, parameter, regions), state in zip(parameters, states, strict=True):
            parts = [
                (region, box, ranks[0] == me)
                for region in regions
                for box, ranks in ranges.parts(
                    region.hf_name,
                    Box(region.start, region.shape),
                    region,
                    where[region.hf_name, region.start],
                )
                if me in ranks
            ]
            self._held.append(_Held(len(self._held), parameter.shape, state, parts))

    def saved(self) -> State:
        """Return the parts that this rank writes, with copies of their values."""
        return {
            key: sharded
            for held in self._held
            for name, flat in held.state.tensors.items()
            for key, sharded in self._boxes(held, name, flat)
        }

    def wanted(self, moments: bool) -> State:
        """Return the parts that this rank reads, with memory for them.

        Args:
            moments: whether there are any: not before the first step.
        """
        names = (MAIN, *MOMENTS) if moments else (MAIN,)
        return {
            held.key(name, number): self._sharded(
                name, region, box, torch.empty(box.shape, dtype=torch.float32)
            )
            for held in self._held
            for name in names
            for number, (region, box, _) in enumerate(held.parts)
        }

    def restore(self, loaded: dict[str, torch.Tensor], moments: bool) -> None:
        """Copy what was read for `wanted` into the optimizer, whose states exist."""
        names = (MAIN, *MOMENTS) if moments else (MAIN,)
        for held in self._held:
            for name in names if held.state.tensors else ():
                whole = torch.zeros(held.shape)  # padded rows of a vocabulary are zero
                for region in dict.fromkeys(region for region, _, _ in held.parts):
                    values = torch.zeros(region.shape)
                    for number, (of, box, _) in enumerate(held.parts):
                        if of is region:
                            found = loaded[held.key(name, number)]
                            values[_within(region, box)] = found.reshape(box.shape)
                    target = whole.view(region.view)[region.spans]
                    target.copy_(values.view(target.shape))
                flat = whole.view(-1)[held.state.begin : held.state.end]
                held.state.tensors[name].copy_(flat.view(held.state.tensors[name].shape))

    def _boxes(
        self, held: _Held, name: str, flat: torch.Tensor
    ) -> Iterator[tuple[str, ShardedTensor]]:
        whole = torch.zeros(held.shape, dtype=flat.dtype)
        whole.view(-1)[held.state.begin : held.state.end] = flat.detach().view(-1).cpu()
        values = {
            region: whole.view(region.view)[region.spans].reshape(region.shape)
            for region in dict.fromkeys(region for region, _, _ in held.parts)
        }
        for number, (region, box, writes) in enumerate(held.parts):
            if writes:
                data = values[region][_within(region, box)].clone(
                    memory_format=torch.contiguous_format
                )
                yield held.key(name, number), self._sharded(name, region, box, data)

    def _sharded(self, name: str, region: Region, box: Box, data: torch.Tensor) -> ShardedTensor:
        return ShardedTensor(
            key=f"optimizer.{name}.{region.hf_name}",
            data=data,
            dtype=data.dtype,
            local_shape=tuple(box.shape),
            global_shape=self._shapes[region.hf_name],
            global_offset=tuple(box.start),
            axis_fragmentations=None,  # no grid: boxes of any size
        )


def _within(region: Region, box: Box) -> tuple[slice, ...]:
    """Return the index of a part within its region."""
    return tuple(
        slice(begin - first, begin - first + size)
        for first, begin, size in zip(region.start, box.start, box.shape, strict=True)
    )
