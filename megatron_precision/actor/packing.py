"""Divides sequences over the data-parallel ranks and into micro-batches, by count or by tokens.

A plan is a pure function of the lengths: every rank computes the plans of all ranks, and all ranks
have equally many micro-batches, since pipeline stages and the experts' all-to-all meet in each.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch

from megatron_precision.actor.batch import MicroBatch
from megatron_precision.config.schema import ModelConfig

Plan = list[MicroBatch]


@dataclass(frozen=True)
class Packing:
    """The rule by which sequences are divided into micro-batches.

    Attributes:
        dp_size: data-parallel ranks.
        micro_batch_size: sequences of one micro-batch of one rank at most, where there is no
            budget of tokens.
        micro_batch_tokens: tokens of one micro-batch of one rank at most, padding included; 0 is
            none.
        width_multiple: padded widths are multiples of this (sequence parallelism divides them).
        attention_tokens: the width at which attention costs as much as all matrix products with
            weights; infinite where attention is not to count.
        packed: sequences of a micro-batch lie end to end in one row, not each in a padded one.
    """

    dp_size: int
    micro_batch_size: int
    micro_batch_tokens: int = 0
    width_multiple: int = 1
    attention_tokens: float = math.inf
    packed: bool = False

    def width(self, length: int) -> int:
        """Round a length up to a width that a micro-batch may have."""
        return -(-length // self.width_multiple) * self.width_multiple

    def micro_batch(self, rows: torch.Tensor, lengths: torch.Tensor) -> MicroBatch:
        """Form the micro-batch of some rows; `lengths` are those of all sequences, [S]."""
        own = lengths[rows]
        packed_tokens = self.width(int(own.sum())) if self.packed else 0
        return MicroBatch(rows, self.width(int(own.max())), packed_tokens)

    def cost(self, micro: MicroBatch, lengths: torch.Tensor) -> float:
        """Estimate a micro-batch's work, in tokens: the sum of its `sequence_cost`s."""
        if not self.packed:
            return len(micro.rows) * self.sequence_cost(micro.width)
        return sum(self.sequence_cost(length) for length in lengths[micro.rows].tolist())

    def sequence_cost(self, width: int) -> float:
        """Estimate the work of a sequence of w tokens, in tokens: w (1 + w / attention_tokens)."""
        return width * (1 + width / self.attention_tokens)


class _Falling:
    """Sequences in falling length, with the cost of consecutive ones as one micro-batch."""

    def __init__(self, lengths: list[int], packing: Packing) -> None:
        self._packing = packing
        self._widths = [packing.width(length) for length in lengths]
        costs = map(packing.sequence_cost, lengths)
        self._tokens_before = list(itertools.accumulate(lengths, initial=0))
        self._cost_before = list(itertools.accumulate(costs, initial=0.0))

    def __len__(self) -> int:
        return len(self._widths)

    def tokens(self, begin: int, end: int) -> int:
        """Count the padded tokens of sequences begin to end."""
        if self._packing.packed:
            return self._packing.width(self._tokens_before[end] - self._tokens_before[begin])
        return (end - begin) * self._widths[begin]

    def cost(self, begin: int, end: int) -> float:
        """Estimate their work, as `Packing.cost`."""
        if self._packing.packed:
            return self._cost_before[end] - self._cost_before[begin]
        return (end - begin) * self._packing.sequence_cost(self._widths[begin])


def attention_tokens(model: ModelConfig) -> float:
    """Return the width at which attention costs as much as the products with weights.

    For one token, forward, of n active weights in matrices: 2 n operations with weights, and
    4 w × heads × head_dim a layer with the keys and values of a sequence of w tokens; half of
    them lie under the causal mask and are counted, because kernels differ in leaving them out.
    """
    heads = model.num_attention_heads * model.head_dim
    kv_heads = model.num_key_value_heads * model.head_dim
    mlp = 3 * model.hidden_size * model.intermediate_size
    if model.num_experts:
        mlp = model.num_experts_per_tok * 3 * model.hidden_size * model.moe_intermediate_size
    layer = 2 * model.hidden_size * (heads + kv_heads) + mlp
    weights = model.num_hidden_layers * layer + model.vocab_size * model.hidden_size
    return weights / (model.num_hidden_layers * heads)


def plan_micro_batches(lengths: torch.Tensor, rows: torch.Tensor, packing: Packing) -> list[Plan]:
    """Plan every rank's micro-batches, long sequences first.

    Args:
        lengths: [S] tokens of every sequence of the batch.
        rows: the sequences to divide, for example those of one mini-batch.

    Returns:
        One plan a rank, all equally long.

    Raises:
        ValueError: where the ranks cannot have equally many micro-batches, or a sequence alone is
            over the budget.
    """
    order = rows[torch.argsort(lengths[rows], descending=True, stable=True)]
    if packing.micro_batch_tokens:
        return _by_tokens(lengths, order, packing)
    if len(rows) % packing.dp_size:
        raise ValueError(
            f"{len(rows)} sequences do not divide over {packing.dp_size} data-parallel ranks"
        )
    return [
        [
            packing.micro_batch(chunk, lengths)
            for chunk in order[rank :: packing.dp_size].split(packing.micro_batch_size)
        ]
        for rank in range(packing.dp_size)
    ]


def _by_tokens(lengths: torch.Tensor, order: torch.Tensor, packing: Packing) -> list[Plan]:
    """Form micro-batches of similar lengths and costs within the budget, and deal them out."""
    if len(order) < packing.dp_size:
        raise ValueError(
            f"{len(order)} sequences for {packing.dp_size} data-parallel ranks: one has none"
        )
    sequences = _Falling(lengths[order].tolist(), packing)
    if sequences.tokens(0, 1) > packing.micro_batch_tokens:
        raise ValueError(
            f"a sequence of {sequences.tokens(0, 1)} padded tokens is over the budget of "
            f"{packing.micro_batch_tokens} tokens a micro-batch"
        )
    plans: list[Plan] = [[] for _ in range(packing.dp_size)]
    loads = [0.0] * packing.dp_size
    made = []
    for chunk in order.split(_cut(sequences, packing)):
        micro = packing.micro_batch(chunk, lengths)
        made.append((packing.cost(micro, lengths), micro))
    # Ranks that meet in an all-to-all run micro-batches of like cost; the one that is behind
    # takes the larger. So no two ranks ever differ by more than two of one such round do.
    made.sort(key=lambda priced: -priced[0])
    for first in range(0, len(made), packing.dp_size):
        behind = sorted(range(packing.dp_size), key=lambda rank: (loads[rank], rank))
        together = made[first : first + packing.dp_size]
        for rank, (cost, micro) in zip(behind, together, strict=True):
            plans[rank].append(micro)
            loads[rank] += cost
    return plans


def _cut(sequences: _Falling, packing: Packing) -> list[int]:
    """Size consecutive micro-batches of falling widths; their number divides by the ranks.

    As few as the budget allows, and of these the cut whose most expensive micro-batch is cheapest
    (to a hundredth).
    """
    fewest = len(_greedy(sequences, math.inf, packing))
    count = -(-fewest // packing.dp_size) * packing.dp_size
    if count > len(sequences):
        # A budget of about one sequence each, and ranks that do not divide the sequences.
        raise ValueError(
            f"{len(sequences)} sequences in {fewest} micro-batches of at most "
            f"{packing.micro_batch_tokens} tokens do not divide over {packing.dp_size} ranks"
        )
    low, high = sequences.cost(0, 1), sequences.cost(0, len(sequences))
    best = _greedy(sequences, high, packing)
    while high > 1.01 * low:
        middle = math.sqrt(low * high)
        sizes = _greedy(sequences, middle, packing)
        if len(sizes) <= count:
            best, high = sizes, middle
        else:
            low = middle
    while len(best) < count:
        # Halving the one of most sequences costs nothing: its shorter half gets narrower.
        largest = max(range(len(best)), key=lambda at: best[at])
        half = best[largest] // 2
        best[largest : largest + 1] = [best[largest] - half, half]
    return best


def _greedy(sequences: _Falling, most_cost: float, packing: Packing) -> list[int]:
    """Size micro-batches by filling each up to the budget and the cost."""
    sizes: list[int] = []
    begin = 0
    for end in range(1, len(sequences) + 1):
        fits = (
            bool(sizes)
            and sequences.tokens(begin, end) <= packing.micro_batch_tokens
            and sequences.cost(begin, end) <= most_cost
        )
        if fits:
            sizes[-1] += 1
        else:
            sizes.append(1)
            begin = end - 1
    return sizes


def padding_share(lengths: torch.Tensor, plans: list[Plan]) -> float:
    """Return the share of tokens that pass through the model and belong to no sequence."""
    micros = [micro for plan in plans for micro in plan]
    padded = sum(micro.tokens for micro in micros)
    return 1 - sum(int(lengths[micro.rows].sum()) for micro in micros) / padded


def dp_imbalance(lengths: torch.Tensor, plans: list[Plan], packing: Packing) -> float:
    """Return how much more work than the mean the busiest rank has: max / mean - 1."""
    loads = [sum(packing.cost(micro, lengths) for micro in plan) for plan in plans]
    return max(loads) * len(loads) / sum(loads) - 1
