"""How cells are put into messages; the same at both ends, and in what is predicted of them."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_precision.weights.plan import Cell

MESSAGE_BYTES = 64 * 2**20
# A cell of as many elements is a message of its own: then packing costs more than a message does.
ALONE_ELEMENTS = 2**20


def messages(cells: list[Cell], limit: int) -> Iterator[list[Cell]]:
    """Cells, message by message: small ones together, at most `limit` elements of them."""
    taken: list[Cell] = []
    filled = 0
    for cell in cells:
        if cell.numel >= ALONE_ELEMENTS:
            yield [cell]
            continue
        if taken and filled + cell.numel > limit:
            yield taken
            taken, filled = [], 0
        taken.append(cell)
        filled += cell.numel
    if taken:
        yield taken
