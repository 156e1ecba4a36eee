"""Where tokens lie in what the model sees, by hand."""

from __future__ import annotations

import torch

from megatron_precision.actor.batch import NOWHERE, MicroBatch, TokenLayout

ROWS = torch.tensor([4, 7])
LENGTHS = torch.tensor([3, 1])
GRID = torch.tensor([[1, 2, 3, 0], [5, 0, 0, 0]])
PADDED = TokenLayout.of(MicroBatch(ROWS, 4), LENGTHS)
PACKED = TokenLayout.of(MicroBatch(ROWS, 4, 6), LENGTHS)


def test_a_padded_grid_is_what_the_model_sees() -> None:
    assert PADDED.packed is None
    assert torch.equal(PADDED.to_model(GRID), GRID)
    assert torch.equal(PADDED.from_model(GRID), GRID)
    assert PADDED.to_layers(GRID).tolist() == [[1, 5], [2, 0], [3, 0], [0, 0]]
    assert PADDED.to_layers(GRID, shard=(1, 2)).tolist() == [[3, 0], [0, 0]]


def test_packed_sequences_lie_end_to_end_and_padding_behind_them() -> None:
    assert PACKED.to_model(GRID).tolist() == [[1, 2, 3, 5, 0, 0]]
    assert PACKED.to_model(GRID, NOWHERE).tolist() == [[1, 2, 3, 5, -1, -1]]
    assert PACKED.to_model(GRID[:, :, None].expand(2, 4, 3), 9)[0, 2:5].tolist() == [
        [3, 3, 3], [5, 5, 5], [9, 9, 9],
    ]  # fmt: skip
    assert PACKED.to_layers(GRID, shard=(1, 2)).tolist() == [[5], [0], [0]]
    assert PACKED.packed is not None
    assert PACKED.packed.cu_seqlens_q.tolist() == [0, 3, 4, 6]
    assert PACKED.packed.cu_seqlens_q.dtype == torch.int32
    assert PACKED.packed.max_seqlen_q == 3


def test_a_row_without_padding_has_no_sequence_more() -> None:
    exact = TokenLayout.of(MicroBatch(ROWS, 4, 4), LENGTHS)
    assert exact.packed is not None
    assert exact.packed.cu_seqlens_q.tolist() == [0, 3, 4]
    assert exact.to_model(GRID, NOWHERE).tolist() == [[1, 2, 3, 5]]


def test_values_come_back_to_their_sequences_and_gradients_to_the_values() -> None:
    values = torch.tensor([[0.5, 1.5, 2.5, 3.5, 8.0, 9.0]], requires_grad=True)
    grid = PACKED.from_model(values)
    assert grid.tolist() == [[0.5, 1.5, 2.5, 0.0], [3.5, 0.0, 0.0, 0.0]]
    (grid * torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[1.0, 2.0, 3.0, 5.0, 0.0, 0.0]]
