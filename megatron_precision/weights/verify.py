"""The proof of a sync: both sides' checksums of every region, compared where it is needed.

The trainers compute a checksum of each cell that they send or copy, of the value as it is cast
for the engine. It follows the cell's route, as a message of its own: eight bytes a cell. A rank
compares it with the checksum of what its engine's kernels read, so that a piece that was corrupted,
dropped, duplicated or sent to the wrong place is a cell that differs, with its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_precision.weights.checksums import checksum, columns_of
from megatron_precision.weights.plan import Cell, RankPlan
from megatron_precision.weights.transport import Views


class RegionProof:
    """One rank's part of the proof, bound to the trainer's tensors.

    Args:
        plan: of this rank.
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
        direct = plan.direct.sends
        self._copies = [(cell, sources.of(cell)) for cell in plan.copies]
        self._sends = {p: [(c, sources.of(c)) for c in cells] for p, cells in direct.items()}
        self.needed = [
            *plan.copies,
            *(c for cells in plan.direct.receives.values() for c in cells),
            *(c for cells in plan.fan_out.receives.values() for c in cells),
        ]

    @torch.no_grad()
    def expected(self) -> dict[Cell, int]:
        """The trainer's checksum of each cell that this rank needs; every rank calls it."""
        known = dict(zip(self._plan.copies, self._sums(self._copies).tolist(), strict=True))
        direct, fan_out = self._plan.direct, self._plan.fan_out
        sent = {peer: self._sums(cells) for peer, cells in self._sends.items()}
        known |= _exchanged(sent, direct.receives)
        passed_on = {
            peer: torch.tensor([known[cell] for cell in cells])
            for peer, cells in fan_out.sends.items()
        }
        return known | _exchanged(passed_on, fan_out.receives)

    def _sums(self, cells: Sequence[tuple[Cell, torch.Tensor]]) -> torch.Tensor:
        if not cells:
            return torch.zeros(0, dtype=torch.int64)
        cast = ((cell, view.to(self._wire).to(self._engine)) for cell, view in cells)
        return torch.stack([checksum(v, columns_of(cell.shape)) for cell, v in cast]).cpu()


def _exchanged(
    sent: Mapping[int, torch.Tensor], receives: Mapping[int, list[Cell]]
) -> dict[Cell, int]:
    """Send each peer its checksums, and receive those of the cells that come from it."""
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    buffers = {
        peer: torch.empty(len(cells), dtype=torch.int64, device=device)
        for peer, cells in receives.items()
    }
    operations = [dist.P2POp(dist.irecv, buffer, peer) for peer, buffer in buffers.items()]
    operations += [dist.P2POp(dist.isend, v.to(device), peer) for peer, v in sent.items()]
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return {
        cell: value
        for peer, cells in receives.items()
        for cell, value in zip(cells, buffers[peer].tolist(), strict=True)
    }
