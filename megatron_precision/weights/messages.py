"""How cells travel: in batches of messages; the same at both ends, and in what is predicted."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_precision.weights.plan import Cell

# What is under way to a rank at once, and what an end may have to hold of it.
BATCH_BYTES = 64 * 2**20
# A cell of as many elements is a message of its own; smaller ones are packed together.
ALONE_ELEMENTS = 2**19


def batches(cells: list[Cell], limit: int) -> Iterator[list[list[Cell]]]:
    """Cells, batch by batch, and in each message by message.

    Args:
        limit: elements of a batch at most; a cell that is larger is a batch.
    """
    taken: list[Cell] = []
    filled = 0
    for cell in cells:
        if taken and filled + cell.numel > limit:
            yield _messages(taken)
            taken, filled = [], 0
        taken.append(cell)
        filled += cell.numel
    if taken:
        yield _messages(taken)


def _messages(cells: list[Cell]) -> list[list[Cell]]:
    large = [[cell] for cell in cells if cell.numel >= ALONE_ELEMENTS]
    small = [cell for cell in cells if cell.numel < ALONE_ELEMENTS]
    return [*large, small] if small else large
