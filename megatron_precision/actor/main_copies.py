"""The FP32 main copies as the distributed optimizer divides them: a range of each parameter."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import torch

from megatron_precision.actor.optimizer import ActorOptimizer
from megatron_precision.weights.flat_ranges import FlatRange
from megatron_precision.weights.regions import Piece


@dataclass
class MainCopies:
    """What a rank holds of the FP32 main copies.

    Attributes:
        held: every piece, with the range of its parameter's main copy, or the parameter.
        firsts: by parameter of which `held` has a range, its first element.
        ranges: the same, for the plans of other ranks.
    """

    held: list[tuple[Piece, torch.Tensor]] = field(default_factory=list)
    firsts: dict[str, int] = field(default_factory=dict)
    ranges: list[FlatRange] = field(default_factory=list)

    @classmethod
    def of(
        cls,
        parameters: Iterable[tuple[str, torch.nn.Parameter, list[Piece]]],
        optimizer: ActorOptimizer,
    ) -> MainCopies:
        """Collect them; an FP32 parameter has no copy, and is taken itself, whole.

        Args:
            parameters: name, parameter and what it holds.

        Raises:
            RuntimeError: where the optimizer keeps its copies to itself.
        """
        found = cls()
        for name, parameter, pieces in parameters:
            copy = optimizer.main_copy(parameter)
            if copy is None:
                found.held += [(piece, parameter.data) for piece in pieces]
                continue
            found.firsts[name] = copy.begin
            found.held += [(piece, copy.values) for piece in pieces]
            end = copy.begin + copy.values.numel()
            found.ranges += [FlatRange(p.hf_name, p.start, copy.begin, end) for p in pieces]
        return found
