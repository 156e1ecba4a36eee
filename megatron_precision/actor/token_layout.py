"""Where the tokens of a micro-batch lie in what the model sees.

Masks, log-probs and losses are grids [b, w], a row a sequence, padded on the right. The model takes
that grid as it is, or "packed": all sequences end to end in one row (Megatron's `thd` format), of
which attention and rotary positions keep each sequence to itself, and padding is at the end alone.
What it sees is [c, s]: rows (columns of Megatron's hidden states) of s tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.packed_seq_params import PackedSeqParams

from megatron_precision.actor.batch import MicroBatch

# Of what belongs to no sequence: the padding behind packed sequences.
NOWHERE = -1


@dataclass(frozen=True)
class TokenLayout:
    """One micro-batch's.

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
        """The layout of a micro-batch whose sequences have these lengths ([b] int64)."""
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
        """[b, w, ...] as [c, s, ...], with `fill` where no sequence is."""
        if self.places is None:
            return grid
        found = grid.flatten(0, 1)[self.places.clamp(min=0)]
        found[self.places == NOWHERE] = fill
        return found

    def to_layers(
        self, grid: torch.Tensor, fill: int | bool = 0, shard: tuple[int, int] = (0, 1)
    ) -> torch.Tensor:
        """[b, w, ...] as layers have hidden states, [s / shards, c, ...].

        Args:
            shard: (rank, number of ranks) that a sequence is divided over.
        """
        rank, ranks = shard
        return self.to_model(grid, fill).transpose(0, 1).chunk(ranks)[rank]

    def from_model(self, values: torch.Tensor) -> torch.Tensor:
        """[c, s] as [b, w], zero where the model saw no token; differentiable."""
        if self.places is None:
            return values
        known = self.places[0] != NOWHERE
        grid = values.new_zeros(self.shape[0] * self.shape[1])
        return grid.scatter(0, self.places[0, known], values[0, known]).view(self.shape)
