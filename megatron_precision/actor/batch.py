"""Holds one iteration's rollouts as tensors, and maps a micro-batch to the form the model sees.

Shape legend: S sequences of the whole job, L the longest prompt plus response. Every rank has the
whole batch and trains on its own rows; `actor/packing.py` divides it into micro-batches.

Masks, log-probs and losses are grids [b, w], one row per sequence, padded on the right. The model
takes that grid, or "packed" sequences: all end to end in one row (Megatron's `thd` format), where
attention and rotary positions keep sequences apart and only the end is padded. The model's input
is [c, s]: c rows of s tokens. `TokenLayout` maps between both forms.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from numpy.typing import NDArray

from megatron_precision.config.schema import UNKNOWN_EXPERT


@dataclass(frozen=True)
class Batch:
    """An iteration's rollouts as tensors.

    Attributes:
        tokens: [S, L] int64, prompt then response, right-padded with zeros.
        response_mask: [S, L] bool, true at response tokens.
        lengths: [S] int64, prompt plus response.
        rollout_logprobs: [S, L] FP32, the engine's, zero outside the response.
        advantages: [S] FP32.
        old_logprobs: [S, L] FP32, the trainer's before the update; None where not computed.
        routed_experts: for each sequence [its tokens, layers, k] uint8, the engine's experts
            (`rollout/routed_experts.py`); None where not recorded. [b, w, layers, k] in a
            micro-batch.
    """

    tokens: torch.Tensor
    response_mask: torch.Tensor
    lengths: torch.Tensor
    rollout_logprobs: torch.Tensor
    advantages: torch.Tensor
    old_logprobs: torch.Tensor | None = None
    routed_experts: Sequence[NDArray[np.uint8]] | torch.Tensor | None = None

    def __len__(self) -> int:
        return self.tokens.shape[0]

    def select(self, rows: torch.Tensor, width: int) -> Batch:
        """Select sequences, cut or padded to `width` tokens."""

        def cut(values: torch.Tensor) -> torch.Tensor:
            return F.pad(values[rows, :width], (0, max(0, width - values.shape[1])))

        return Batch(
            tokens=cut(self.tokens),
            response_mask=cut(self.response_mask),
            lengths=self.lengths[rows],
            rollout_logprobs=cut(self.rollout_logprobs),
            advantages=self.advantages[rows],
            old_logprobs=None if self.old_logprobs is None else cut(self.old_logprobs),
            routed_experts=self._experts(rows, width),
        )

    def predicts(self) -> torch.Tensor:
        """Tokens whose logits predict a response token, [S, L] bool."""
        found = torch.zeros_like(self.response_mask)
        found[:, :-1] = self.response_mask[:, 1:]
        return found

    def to(self, device: torch.device) -> Batch:
        """Copy the micro-batch to a device; a batch itself stays on the host."""
        moved = {
            field.name: value.to(device)
            for field in fields(self)
            if torch.is_tensor(value := getattr(self, field.name))
        }
        return replace(self, **moved)

    def _experts(self, rows: torch.Tensor, width: int) -> torch.Tensor | None:
        """Return routed experts, [b, w, layers, k] uint8, padded with the unknown choice."""
        every = self.routed_experts
        if every is None:
            return None
        parts = [torch.as_tensor(every[row]) for row in rows.tolist()]
        found = torch.full(
            (len(parts), width, *parts[0].shape[1:]), UNKNOWN_EXPERT, dtype=torch.uint8
        )
        for row, part in enumerate(parts):
            found[row, : len(part)] = part[:width]
        return found

    def with_old_logprobs(self, old_logprobs: torch.Tensor) -> Batch:
        """Return the batch with the trainer's log-probs before the update."""
        return replace(self, old_logprobs=old_logprobs)


@dataclass(frozen=True)
class MicroBatch:
    """Rows of the batch that pass through the model together.

    Attributes:
        rows: [b] int64.
        width: of the grid [b, width] of its tokens.
        packed_tokens: of the one row that has all sequences end to end, with the padding behind
            them; 0 where the model takes the grid (`actor/token_layout.py`).
    """

    rows: torch.Tensor
    width: int
    packed_tokens: int = 0

    @property
    def tokens(self) -> int:
        """The number of tokens that pass through the model, padding included."""
        return self.packed_tokens or len(self.rows) * self.width


def make_batch(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    rollout_logprobs: Sequence[Sequence[float]],
    advantages: torch.Tensor,
    routed_experts: Sequence[NDArray[np.uint8] | None] | None = None,
) -> Batch:
    """Pad rollouts on the right into one batch.

    Args:
        prompts, responses: token ids, one sequence a rollout; a response may be empty.
        rollout_logprobs: one a response token.
        advantages: [S] FP32.
        routed_experts: the engine's choices, of every sequence or of none.
    """
    lengths = [len(p) + len(r) for p, r in zip(prompts, responses, strict=True)]
    shape = (len(lengths), max(lengths))
    tokens = torch.zeros(shape, dtype=torch.int64)
    mask = torch.zeros(shape, dtype=torch.bool)
    logprobs = torch.zeros(shape, dtype=torch.float32)
    for row, (prompt, response, lps) in enumerate(
        zip(prompts, responses, rollout_logprobs, strict=True)
    ):
        if len(lps) != len(response):
            raise ValueError(f"rollout {row}: {len(lps)} log-probs for {len(response)} tokens")
        begin, end = len(prompt), len(prompt) + len(response)
        tokens[row, :end] = torch.tensor([*prompt, *response])
        mask[row, begin:end] = True
        logprobs[row, begin:end] = torch.tensor(list(lps), dtype=torch.float32)
    experts = [found for found in routed_experts or () if found is not None]
    if len(experts) not in (0, len(lengths)):
        raise ValueError(f"{len(experts)} of {len(lengths)} rollouts carry their experts")
    return Batch(
        tokens,
        mask,
        torch.tensor(lengths),
        logprobs,
        advantages.float(),
        routed_experts=experts or None,
    )


# Of what belongs to no sequence: the padding behind packed sequences.
NOWHERE = -1


@dataclass(frozen=True)
class TokenLayout:
    """Maps a micro-batch between the padded grid [b, w] and the rows that the model sees [c, s].

    Attributes:
        shape: (b, w) of its grid.
        places: [c, s] int64, where in the flattened grid each token is; `NOWHERE` for padding that
            the grid has not. None where the model takes the grid itself.
        packed: what Megatron's attention needs to know of packed sequences.
    """

    shape: tuple[int, int]
    places: torch.Tensor | None = None
    packed: PackedSeqParams | None = None

    @classmethod
    def of(cls, micro: MicroBatch, lengths: torch.Tensor) -> TokenLayout:
        """Lay out a micro-batch whose sequences have these lengths ([b] int64)."""
        shape = (len(micro.rows), micro.width)
        if not micro.packed_tokens:
            return cls(shape)
        positions = torch.arange(micro.width, device=lengths.device)
        real = positions < lengths[:, None]
        places = torch.full((1, micro.packed_tokens), NOWHERE, device=lengths.device)
        inside = real.flatten().nonzero().squeeze(1)
        places[0, : len(inside)] = inside
        # The padding is a sequence of its own: Megatron's kernels want every token in one.
        parts = lengths.tolist()
        if padding := micro.packed_tokens - len(inside):
            parts.append(padding)
        ends = torch.tensor([0, *parts], device=lengths.device).cumsum(0).int()
        longest = max(parts)
        packed = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        )
        return cls(shape, places, packed)

    def to_model(self, grid: torch.Tensor, fill: int | bool = 0) -> torch.Tensor:
        """Map [b, w, ...] to [c, s, ...], with `fill` where there is no sequence."""
        if self.places is None:
            return grid
        found = grid.flatten(0, 1)[self.places.clamp(min=0)]
        found[self.places == NOWHERE] = fill
        return found

    def to_layers(
        self, grid: torch.Tensor, fill: int | bool = 0, shard: tuple[int, int] = (0, 1)
    ) -> torch.Tensor:
        """Map [b, w, ...] to the shape of hidden states, [s / shards, c, ...].

        Args:
            shard: (rank, number of ranks) that a sequence is divided over.
        """
        rank, ranks = shard
        return self.to_model(grid, fill).transpose(0, 1).chunk(ranks)[rank]

    def from_model(self, values: torch.Tensor) -> torch.Tensor:
        """Map [c, s] to [b, w], zero where the model saw no token; differentiable."""
        if self.places is None:
            return values
        known = self.places[0] != NOWHERE
        grid = values.new_zeros(self.shape[0] * self.shape[1])
        return grid.scatter(0, self.places[0, known], values[0, known]).view(self.shape)
