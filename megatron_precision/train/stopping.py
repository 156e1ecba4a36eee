"""What ends a run early: a signal, on which all ranks agree, and overflows without an end."""

from __future__ import annotations

import signal
from types import FrameType

import torch
import torch.distributed as dist

from megatron_precision.actor.optimizer import ActorOptimizer
from megatron_precision.config import LossScaleConfig
from megatron_precision.errors import Problem, UserError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """Whether a signal has asked for the run's end.

    The handler does nothing else, in the writers of a checkpoint too, which are forked with it: a
    scheduler may send the signal to every process, and torchrun passes its own on.
    """

    def __init__(self) -> None:
        self._number = 0

    def install(self) -> None:
        """Take the signals over; call it after the engine, which may have handlers of its own."""
        for number in SIGNALS:
            signal.signal(number, self._note)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self._number = number

    def agreed(self) -> str:
        """The signal that reached any rank, by name; "" where none has. Every rank calls it."""
        number = torch.tensor([self._number])
        dist.all_reduce(number, op=dist.ReduceOp.MAX)
        return signal.Signals(int(number)).name if number else ""


def give_up_where_hopeless(
    optimizer: ActorOptimizer, settings: LossScaleConfig, cause: str
) -> None:
    """End a run whose every step overflows, with nothing left to lower.

    Args:
        cause: of the last overflow.

    Raises:
        UserError: with advice; on every rank, for the flag is agreed.
    """
    if optimizer.hopeless_overflows < settings.hopeless_overflows:
        return
    scale = optimizer.loss_scale
    where = "with no scale" if scale is None else f"at the smallest loss scale, {scale.value:g}"
    raise UserError(
        Problem(
            what=f"{optimizer.hopeless_overflows} optimizer steps in a row overflowed {where}",
            where="loss_scale.min_scale, loss_scale.hopeless_overflows",
            got=f"cause of the last: {cause}",
            expected="a step that can be taken now and then",
            remedy=(
                "resume from a checkpoint before the weights grew, with a lower learning rate in a "
                "new run; look at precision/act_max_trainer (65504 is FP16's end) and "
                "loss/grad_norm; bf16 has fp32's range"
            ),
        )
    )
