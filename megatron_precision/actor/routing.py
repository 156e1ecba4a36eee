"""Compares the trainer's routers with the engine's, and replays the engine's choices.

With routing replay (R3) every router of the trainer takes the experts that the engine chose while
it sampled. Their weights are still the softmax of the trainer's own logits over those experts, so
gradients reach the router. A token whose choice is unknown keeps the trainer's own.

Source: rollout routing replay, arXiv 2510.11370.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.router import TopKRouter

from megatron_precision.actor.batch import NOWHERE, TokenLayout
from megatron_precision.config.schema import UNKNOWN_EXPERT


@dataclass(frozen=True)
class RouterFlips:
    """Counts how the trainer's choices differ from the engine's, over the known tokens.

    Attributes:
        flip_share: share of (token, layer) whose sets of experts differ.
        by_layer: the same of each layer.
        overlap: mean share of a set that the two have in common.
        tokens: known tokens.
    """

    flip_share: float
    by_layer: list[float]
    overlap: float
    tokens: int

    def metrics(self) -> dict[str, float | list[float]]:
        """Return the figures by their names in `metrics.jsonl`."""
        return {
            "mismatch/router_flip_share": self.flip_share,
            "mismatch/router_overlap": self.overlap,
            "mismatch/router_flip_share_by_layer": self.by_layer,
        }


class Routing:
    """All routers of this rank.

    Args:
        module: the model.
        num_layers: of the whole model.
        replay: whether the engine's choice is taken.
        recompute: whether layers run again in the backward pass.
        shard: (rank, number of ranks) that a sequence is divided over where a router sees it.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        *,
        num_layers: int,
        replay: bool,
        recompute: bool,
        shard: tuple[int, int],
    ) -> None:
        self.replay, self.recompute, self.shard = replay, recompute, shard
        self.counting = False
        self.experts: torch.Tensor | None = None
        self._places: torch.Tensor | None = None
        self._flipped_layers: torch.Tensor | None = None
        # Rows: flipped tokens, sum of overlaps, known tokens.
        self._counts = torch.zeros(3, num_layers, dtype=torch.float64)
        self._layers = []
        for router in module.modules():
            if isinstance(router, TopKRouter):
                layer = _LayerRouting(self, router.layer_number - 1)
                router.router_replay = layer
                self._layers.append(layer)

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count flips in the forward passes of a block: those with the weights that sampled."""
        self.counting = True
        try:
            yield
        finally:
            self.counting = False

    def begin_pass(self) -> None:
        """Forget what an earlier pass left for its backward pass."""
        for layer in self._layers:
            layer.waiting.clear()

    def micro_batch(
        self, experts: torch.Tensor | None, layout: TokenLayout, rows: torch.Tensor
    ) -> None:
        """Begin the forward pass of another micro-batch.

        Args:
            experts: [b, w, layers, k] uint8, the engine's; None where it recorded none.
            layout: where its tokens lie in what the model sees.
            rows: [b] its sequences' places in the batch, for `recorded`.
        """
        self.experts = self._places = None
        if experts is None:
            return
        self.experts = layout.to_layers(experts, UNKNOWN_EXPERT, self.shard).flatten(0, 1)
        if self._flipped_layers is not None:
            rows, length = rows.to(experts.device), self._flipped_layers.shape[1]
            column = torch.arange(layout.shape[1], device=rows.device).expand(layout.shape)
            # A micro-batch may be padded beyond the batch.
            places = torch.where(column < length, rows[:, None] * length + column, NOWHERE)
            self._places = layout.to_layers(places, NOWHERE, self.shard).flatten()

    def record(self, sequences: int, tokens: int) -> None:
        """Start to record in how many layers each token of a batch [S, L] is flipped."""
        self._flipped_layers = torch.zeros(sequences, tokens, dtype=torch.int32)

    def take_recorded(self) -> torch.Tensor:
        """Return the flipped layers of each token of the job, [S, L] int32, and stop recording."""
        assert self._flipped_layers is not None
        found, self._flipped_layers = self._flipped_layers, None
        dist.all_reduce(found)
        return found

    def take_flips(self) -> RouterFlips | None:
        """Return the counts since the last call, over the whole job; None if there are none."""
        counts = self._counts.clone()
        self._counts.zero_()
        dist.all_reduce(counts)
        flipped, overlap, known = counts
        if not bool(known.sum()):
            return None
        return RouterFlips(
            flip_share=float(flipped.sum() / known.sum()),
            by_layer=(flipped / known.clamp(min=1)).tolist(),
            overlap=float(overlap.sum() / known.sum()),
            tokens=int(known.max()),
        )

    def count(
        self, layer: int, own: torch.Tensor, engine: torch.Tensor, known: torch.Tensor
    ) -> None:
        """Add one router's choices [tokens, k] to the counts."""
        common = (own[:, :, None] == engine[:, None, :]).any(-1).sum(-1)
        top_k = own.shape[1]
        flipped = (common < top_k) & known
        self._counts[0, layer] += float(flipped.sum())
        self._counts[1, layer] += float(common[known].sum()) / top_k
        self._counts[2, layer] += float(known.sum())
        if self._flipped_layers is not None and self._places is not None:
            self._flipped_layers.view(-1)[self._places[flipped].cpu()] += 1


class _LayerRouting:
    """One router's top-k, in the place of Megatron's `RouterReplay`."""

    def __init__(self, routing: Routing, layer: int) -> None:
        self._routing, self._layer = routing, layer
        # Micro-batches whose backward pass is still to come: it may run this layer again, when
        # a pipeline has begun other micro-batches. It takes them in the order of the forward pass.
        self.waiting: list[torch.Tensor | None] = []

    def get_replay_topk(
        self,
        scores: torch.Tensor,
        topk: int,
        num_groups: int | None = None,
        group_topk: int | None = None,
        default_compute_topk: Callable[..., Any] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return values and indices [tokens, k] of the experts to use, for Megatron's router."""
        assert default_compute_topk is not None
        values, own = default_compute_topk(
            scores, topk, num_groups=num_groups, group_topk=group_topk
        )
        routing = self._routing
        again = torch._C._current_graph_task_id() != -1  # a layer that runs again in backward
        experts = self.waiting.pop(0) if again else routing.experts
        if routing.recompute and not again:
            self.waiting.append(experts)
        if experts is None or not (routing.replay or routing.counting):
            return values, own
        engine = experts[:, self._layer].long()
        known = (engine != UNKNOWN_EXPERT).all(-1)
        if routing.counting and not again:
            routing.count(self._layer, own, engine, known)
        if not routing.replay:
            return values, own
        # In falling order, as top-k has them: the same set gives the same bits.
        chosen = torch.where(known[:, None], engine, own)
        taken, order = scores.gather(1, chosen).sort(dim=1, descending=True, stable=True)
        return taken, chosen.gather(1, order)
