"""Describes this rank's parameters as regions of Hugging Face tensors.

`HeldWeights` loads, perturbs and lists the live parameters. It also describes the FP32 main copies,
of which the distributed optimizer gives each rank a range. `gathered` puts a whole model together
on every rank, for checkpoints of small models and as an oracle of tests; the weight sync does not
use it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

from megatron_precision.actor.optimizer import ActorOptimizer
from megatron_precision.actor.parallel import coordinates
from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.schema import ModelConfig, RunConfig
from megatron_precision.layouts.architectures import hf_shapes
from megatron_precision.layouts.megatron import megatron_regions
from megatron_precision.layouts.regions import Region, uncovered
from megatron_precision.sync.flat_ranges import FlatRange
from megatron_precision.sync.plan import PlanError


@dataclass
class MainCopies:
    """This rank's part of the FP32 main copies.

    Attributes:
        held: every region, with the range of its parameter's main copy, or the parameter.
        firsts: by parameter of which `held` has a range, its first element.
        ranges: the same, for the plans of other ranks.
    """

    held: list[tuple[Region, torch.Tensor]] = field(default_factory=list)
    firsts: dict[str, int] = field(default_factory=dict)
    ranges: list[FlatRange] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        parameters: Iterable[tuple[str, torch.nn.Parameter, list[Region]]],
        optimizer: ActorOptimizer,
    ) -> MainCopies:
        """Collect the main copies; an FP32 parameter has none and stands for itself.

        Args:
            parameters: name, parameter and what it holds.

        Raises:
            RuntimeError: where the optimizer keeps its copies to itself.
        """
        found = cls()
        for name, parameter, regions in parameters:
            copy = optimizer.main_copy(parameter)
            if copy is None:
                found.held += [(region, parameter.data) for region in regions]
                continue
            found.firsts[name] = copy.begin
            found.held += [(region, copy.values) for region in regions]
            end = copy.begin + copy.values.numel()
            found.ranges += [FlatRange(p.hf_name, p.start, copy.begin, end) for p in regions]
        return found


class HeldWeights:
    """This rank's parameters, described as regions of Hugging Face tensors.

    Args:
        module: its stage of the model.
        optimizer: which has the FP32 main copies.
        config: the run's.
    """

    def __init__(
        self, module: torch.nn.Module, optimizer: ActorOptimizer, config: RunConfig
    ) -> None:
        self._module, self._optimizer = module, optimizer
        self._config, self._policy = config.model, config.policy

    def live(self) -> list[tuple[Region, torch.Tensor]]:
        """List this rank's regions, each with its live parameter."""
        return [(region, live.data) for _, live, regions in self.parameters() for region in regions]

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter, list[Region]]]:
        """List this rank's parameters, each with its name and its regions."""
        at = coordinates(self._config.num_experts, self._config.num_hidden_layers)
        for name, parameter in self._module.named_parameters():
            regions = megatron_regions(name, tuple(parameter.shape), self._config, at)
            yield name, parameter, regions

    def main_copies(self) -> MainCopies:
        """Return the FP32 main copies on this rank."""
        return MainCopies.of(self.parameters(), self._optimizer)

    def views(self) -> list[tuple[Region, torch.Tensor]]:
        """List this rank's regions, each with its strided view of the live parameter."""
        return [(region, live.view(region.view)[region.spans]) for region, live in self.live()]

    @contextlib.contextmanager
    def changed(self, change: Callable[[Region, torch.Tensor], torch.Tensor]) -> Iterator[None]:
        """Change the weights for a block and restore them after it; no step may be taken inside.

        Args:
            change: (region, its values) to new values of the same shape.
        """
        regions = self.views()
        held = [view for _, view in regions]
        with_main_copies = self._policy.wire_source == "main_copies"
        if with_main_copies:
            held += [values for _, values in self.main_copies().held]
        true = [view.clone() for view in held]
        try:
            with torch.no_grad():
                for region, view in regions:
                    view.copy_(change(region, view))
            if with_main_copies:
                self._optimizer.reload_main_params()
            yield
        finally:
            with torch.no_grad():
                for view, values in zip(held, true, strict=True):
                    view.copy_(values)
            if with_main_copies:
                self._optimizer.main_copies_changed()

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Any]) -> None:
        """Load Hugging Face tensors (any float dtype), padded vocabulary rows zeroed.

        Args:
            tensors: by name; tensors, or what gives one for a box.

        Raises:
            KeyError: for a tensor that is missing.
            UserError: for values that the parameters' dtype cannot hold.
        """
        for name, parameter in self._module.named_parameters():
            if name in ("embedding.word_embeddings.weight", "output_layer.weight"):
                parameter.zero_()
        beyond = []
        for region, view in self.views():
            view.copy_(tensors[region.hf_name][region.box].reshape(view.shape))
            if self._policy.params == "fp16" and not torch.isfinite(view).all():
                beyond.append(region.hf_name)
        if beyond:
            raise UserError(
                Problem(
                    "weights outside the range of fp16", "start.checkpoint",
                    ", ".join(dict.fromkeys(beyond)), "values up to 65504",
                    "the converter's audit lists them: python -m tools.checkpoint_convert audit",
                )
            )  # fmt: skip
        self._optimizer.reload_main_params()


@torch.no_grad()
def gathered(
    held: list[tuple[Region, torch.Tensor]], model: ModelConfig
) -> dict[str, torch.Tensor]:
    """Put the whole model together from the ranks' regions; every rank calls it.

    Args:
        held: this rank's regions with their values, all of one dtype.

    Raises:
        PlanError: where the ranks' regions do not cover the model.
    """
    shapes = hf_shapes(model)
    everyone: list[list[Region]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, [region for region, _ in held])
    if problems := uncovered((region for regions in everyone for region in regions), shapes):
        raise PlanError("the trainer's regions do not make the model:\n  " + "\n  ".join(problems))
    dtype = held[0][1].dtype
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for rank, regions in enumerate(everyone):
        # Of replicas, the lowest rank's.
        owned = [
            n for n, region in enumerate(regions) if (region.hf_name, region.start) not in seen
        ]
        seen.update((region.hf_name, region.start) for region in regions)
        packed = torch.empty(sum(regions[n].numel for n in owned), dtype=dtype)
        if rank == dist.get_rank() and owned:
            packed.copy_(torch.cat([held[n][1].flatten() for n in owned]))
        dist.broadcast(packed, rank)
        for n, part in zip(owned, packed.split([regions[n].numel for n in owned]), strict=True):
            region = regions[n]
            tensors[region.hf_name][region.box] = part.view(region.shape)
    return tensors
