"""What a rank does in tests of `memory.optimizer_offload`: an optimizer partly on the host.

Megatron's optimizer of two devices is the real one. Both devices are the CPU: which parameters are
on the GPU is asked in one of its methods, there all of them are, and its streams do nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer

from megatron_precision.config.schema import ParallelConfig
from megatron_precision.train.warm_start import full_tensors
from tests.distributed import resume_bodies
from tests.distributed.actor_bodies import make_actor, weighted_logprobs
from tests.distributed.cases import Case


@contextlib.contextmanager
def both_devices_here() -> Iterator[None]:
    """Let `HybridDeviceOptimizer` divide parameters as if they were on a GPU."""
    divide = HybridDeviceOptimizer._get_sub_optimizer_param_groups

    def pinned(tensor: torch.Tensor) -> torch.Tensor:
        tensor.is_on_the_host = True  # type: ignore[attr-defined]
        return tensor

    def divided(self: HybridDeviceOptimizer, fraction: float) -> Any:
        on_gpu = property(lambda tensor: not hasattr(tensor, "is_on_the_host"))
        with (
            mock.patch.object(torch.Tensor, "is_cuda", on_gpu),
            mock.patch.object(torch.Tensor, "pin_memory", pinned),
        ):
            return divide(self, fraction)

    with mock.patch.object(HybridDeviceOptimizer, "_get_sub_optimizer_param_groups", divided):
        yield


def steps(case: Case, offloaded: float) -> dict[str, Any]:
    """Three steps from loaded weights: the main copies before them, and the weights after."""
    memory = dataclasses.replace(case.config.memory, optimizer_offload=offloaded)
    with both_devices_here():
        actor = make_actor(dataclasses.replace(case.config, memory=memory), case.tensors)
        members = [member.optimizer for member in actor.optimizer.members]
        on_host = [len(getattr(inner, "gpu_params_map_cpu_copy", {})) for inner in members]
        unlike = [
            name
            for name, parameter, _ in actor.weights.parameters()
            if (copy := actor.optimizer.main_copy(parameter)) is not None
            and not torch.equal(copy.values, parameter.detach().view(-1).float())
        ]
        plan = actor.plan(case.batch, torch.arange(len(case.batch)))
        for _ in range(3):
            actor.step(case.batch, plan, weighted_logprobs)
            actor.optimizer.step_aside()
            actor.optimizer.come_back()
        return {
            "on_host": on_host,
            "unlike": unlike,
            "weights": full_tensors(actor, case.config.model),
        }


def through_layouts(
    case: Case, model_dir: str, layouts: list[ParallelConfig], folder: str
) -> dict[str, Any]:
    """`resume_bodies.through_layouts`, with the case's share on the host."""
    with both_devices_here():
        return resume_bodies.through_layouts(case, model_dir, layouts, folder)
