"""Full Hugging Face tensors from a trainer's pieces: for a checkpoint, and as an oracle of tests.

Every rank ends up with the whole model, so this is for small models alone; the weight sync does
not use it.
"""

from __future__ import annotations

import torch
import torch.distributed as dist

from megatron_precision.actor.actor import Actor
from megatron_precision.config import ModelConfig
from megatron_precision.weights.architectures import hf_shapes
from megatron_precision.weights.plan import PlanError
from megatron_precision.weights.regions import Piece, uncovered


@torch.no_grad()
def full_tensors(actor: Actor, model: ModelConfig) -> dict[str, torch.Tensor]:
    """The trainer's weights now, in their own dtype; every rank calls it.

    Raises:
        PlanError: where the ranks' pieces do not cover the model.
    """
    return gathered(actor.weights.views(), model)


@torch.no_grad()
def gathered(held: list[tuple[Piece, torch.Tensor]], model: ModelConfig) -> dict[str, torch.Tensor]:
    """The model that the ranks' pieces make; every rank calls it.

    Args:
        held: this rank's pieces with their values, all of one dtype.

    Raises:
        PlanError: where the ranks' pieces do not cover the model.
    """
    shapes = hf_shapes(model)
    everyone: list[list[Piece]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, [piece for piece, _ in held])
    if problems := uncovered((piece for pieces in everyone for piece in pieces), shapes):
        raise PlanError("the trainer's pieces do not make the model:\n  " + "\n  ".join(problems))
    dtype = held[0][1].dtype
    tensors = {name: torch.empty(shape, dtype=dtype) for name, shape in shapes.items()}
    seen: set[tuple[str, tuple[int, ...]]] = set()
    for rank, pieces in enumerate(everyone):
        # Of replicas, the lowest rank's.
        owned = [n for n, piece in enumerate(pieces) if (piece.hf_name, piece.start) not in seen]
        seen.update((piece.hf_name, piece.start) for piece in pieces)
        packed = torch.empty(sum(pieces[n].numel for n in owned), dtype=dtype)
        if rank == dist.get_rank() and owned:
            packed.copy_(torch.cat([held[n][1].flatten() for n in owned]))
        dist.broadcast(packed, rank)
        for n, part in zip(owned, packed.split([pieces[n].numel for n in owned]), strict=True):
            piece = pieces[n]
            tensors[piece.hf_name][piece.box] = part.view(piece.shape)
    return tensors
