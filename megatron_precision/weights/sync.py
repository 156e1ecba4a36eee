"""Trainer to engine: after a push the engine holds exactly the trainer's weights.

The first, plain way: every rank contributes the boxes it owns to one packed all-gather, Hugging
Face tensors are put together from them in buffers that stay, and the engine loads them through
its own loader. Ownership (the lowest rank that holds a box) is settled once.

Every push is checked where the kernels read: see `verify.py`.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_precision.actor.actor import Actor
from megatron_precision.config import ModelConfig
from megatron_precision.precision.dtypes import torch_dtype
from megatron_precision.rollout.vllm_engine import VllmEngine
from megatron_precision.weights.architectures import hf_shapes
from megatron_precision.weights.regions import Piece, uncovered
from megatron_precision.weights.verify import verify_engine


class WeightSyncError(RuntimeError):
    """The engine does not hold the trainer's weights."""


@dataclass(frozen=True)
class SyncResult:
    """One push.

    Attributes:
        seconds: gather, load and verification on this rank.
        bytes: bytes that entered this rank's buffers.
        verified: parameters of this rank's engine that were read back and compared.
    """

    seconds: float
    bytes: int
    verified: int


@dataclass(frozen=True)
class _Slot:
    """A box of a Hugging Face tensor, and where it lies in its owner's packed buffer."""

    hf_name: str
    box: tuple[slice, ...]
    shape: tuple[int, ...]
    begin: int
    end: int


class TensorGather:
    """Full Hugging Face tensors from every rank's pieces, in the wire dtype.

    Raises:
        WeightSyncError: where the ranks' pieces do not cover the model.
    """

    def __init__(self, actor: Actor, model: ModelConfig) -> None:
        self._actor = actor
        self.dtype = torch_dtype(actor.policy.wire)
        shapes = hf_shapes(model)
        mine = [piece for piece, _ in actor.weight_pieces()]
        everyone: list[list[Piece]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine)
        if problems := uncovered((p for pieces in everyone for p in pieces), shapes):
            raise WeightSyncError(
                "the trainer's pieces do not make the model:\n  " + "\n  ".join(problems)
            )

        owned: set[tuple[str, tuple[int, ...]]] = set()
        self._slots: list[list[_Slot]] = []
        self._sends: list[bool] = []
        for rank, pieces in enumerate(everyone):
            slots, offset = [], 0
            for piece in pieces:
                first = (piece.hf_name, piece.start) not in owned
                if rank == dist.get_rank():
                    self._sends.append(first)
                if not first:
                    continue
                owned.add((piece.hf_name, piece.start))
                end = offset + piece.numel
                slots.append(_Slot(piece.hf_name, piece.box, piece.shape, offset, end))
                offset += piece.numel
            self._slots.append(slots)
        longest = max(slots[-1].end if slots else 0 for slots in self._slots)
        self._packed = torch.zeros(longest, dtype=self.dtype)
        self._received = torch.zeros(dist.get_world_size(), longest, dtype=self.dtype)
        self._tensors = {name: torch.empty(s, dtype=self.dtype) for name, s in shapes.items()}
        self.bytes = sum(math.prod(s) for s in shapes.values()) * self._packed.element_size()

    @torch.no_grad()
    def gather(self) -> dict[str, torch.Tensor]:
        """The trainer's weights now; the tensors are reused by the next call."""
        offset = 0
        for (piece, view), sends in zip(self._actor.weight_pieces(), self._sends, strict=True):
            if sends:
                self._packed[offset : offset + piece.numel].view(view.shape).copy_(view)
                offset += piece.numel
        dist.all_gather(list(self._received), self._packed)
        for rank, slots in enumerate(self._slots):
            for slot in slots:
                part = self._received[rank, slot.begin : slot.end].view(slot.shape)
                self._tensors[slot.hf_name][slot.box].copy_(part)
        return self._tensors


class WeightSync:
    """Pushes the trainer's weights into the engine, and proves each push."""

    def __init__(self, actor: Actor, engine: VllmEngine, model: ModelConfig) -> None:
        self._model = model
        self._engine = engine
        self.gathering = TensorGather(actor, model)

    def push(self, weight_version: int) -> SyncResult:
        """Give the engine the trainer's weights under a new version.

        Raises:
            WeightSyncError: naming every parameter that differs, on any rank.
        """
        begin = time.perf_counter()
        tensors = self.gathering.gather()
        return self.push_tensors(tensors, weight_version, begin)

    def push_tensors(
        self, tensors: dict[str, torch.Tensor], weight_version: int, begin: float | None = None
    ) -> SyncResult:
        """Give the engine these Hugging Face tensors (the start-up proof pushes perturbed ones)."""
        begin = time.perf_counter() if begin is None else begin
        self._engine.load(tensors, weight_version)
        compared, differing = verify_engine(self._engine, tensors, self._model)
        everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, differing)
        problems = [f"rank {r}: {d}" for r, found in enumerate(everyone) for d in found]
        if problems:
            raise WeightSyncError(
                f"after sync {weight_version} the engine's kernels read other weights than the "
                "trainer holds:\n  " + "\n  ".join(problems)
            )
        return SyncResult(time.perf_counter() - begin, self.gathering.bytes, compared)
