"""The proof of a sync: both sides' checksums of every region, compared where it is needed.

The trainers compute a checksum of each cell that they send or copy, of the value as it is cast
for the engine. It follows the cell's route, as a message of its own: eight bytes a cell. A rank
compares it with the checksum of what its engine's kernels read, so that a piece that was corrupted,
dropped, duplicated or sent to the wrong place is a cell that differs, with its name.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.distributed as dist

from megatron_precision.weights.checksums import checksum, columns_of
from megatron_precision.weights.plan import Cell, Exchange, RankPlan
from megatron_precision.weights.transport import Views


class RegionProof:
    """One rank's part of the proof, bound to the trainer's tensors.

    Args:
        plan: of this rank, whole: one message a peer, whatever the number of layers.
        sources: the trainer's cells on this rank.
        wire: dtype of what is sent.
        engine: dtype of the engine's parameters.

    Attributes:
        needed: the cells of this rank's engine.

    Raises:
        PlanError: where a cell of the plan is in no piece.
    """

    def __init__(
        self, plan: RankPlan, sources: Views, *, wire: torch.dtype, engine: torch.dtype
    ) -> None:
        self._plan, self._wire, self._engine = plan, wire, engine
        self._held = {cell: sources.of(cell) for cell in plan.held}
        self.needed = plan.needed

    @torch.no_grad()
    def held(self) -> dict[Cell, int]:
        """The trainer's checksum of each cell that it sends or copies from this rank."""
        if not self._held:
            return {}
        cast = ((c, view.to(self._wire).to(self._engine)) for c, view in self._held.items())
        sums = torch.stack([checksum(view, columns_of(cell.shape)) for cell, view in cast])
        return dict(zip(self._held, sums.tolist(), strict=True))

    def arrived(self, held: Mapping[Cell, int]) -> dict[Cell, int]:
        """The trainer's checksum of each cell that this rank needs; every rank calls it."""
        known = {cell: held[cell] for cell in self._plan.copies}
        known |= _exchanged(self._plan.direct, held)
        return known | _exchanged(self._plan.fan_out, known)


def _exchanged(exchange: Exchange, known: Mapping[Cell, int]) -> dict[Cell, int]:
    """Send each peer its cells' checksums, and receive those of the cells that come from it."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    buffers = {
        peer: torch.empty(len(cells), dtype=torch.int64, device=device)
        for peer, cells in exchange.receives.items()
    }
    operations = [dist.P2POp(dist.irecv, buffer, peer) for peer, buffer in buffers.items()]
    for peer, cells in exchange.sends.items():
        values = torch.tensor([known[cell] for cell in cells], dtype=torch.int64, device=device)
        operations.append(dist.P2POp(dist.isend, values, peer))
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return {
        cell: value
        for peer, cells in exchange.receives.items()
        for cell, value in zip(cells, buffers[peer].tolist(), strict=True)
    }
