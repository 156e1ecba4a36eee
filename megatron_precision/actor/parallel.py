"""Opens the `torchrun` world once and divides it into Megatron's process groups."""

from __future__ import annotations

import datetime

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel

from megatron_precision.config.schema import ParallelConfig
from megatron_precision.layouts.megatron import ShardCoordinates

# A collective that waits longer than this has lost a peer; the job then ends with an error.
COLLECTIVE_TIMEOUT_S = 600.0


def open_world(backend: str, timeout_s: float = COLLECTIVE_TIMEOUT_S) -> None:
    """Open the default process group from torchrun's environment, if it is not open yet.

    Args:
        timeout_s: of a collective. Where a watchdog knows the phases it should be longer than all
            of their limits: a collective that breaks does not say who is missing.
    """
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=datetime.timedelta(seconds=timeout_s))


def divide_world(parallel: ParallelConfig, seed: int) -> None:
    """Create Megatron's groups and seed its RNG tracker.

    Raises:
        ValueError: where the open world has not the size that the config states.
    """
    if dist.get_world_size() != parallel.world_size:
        raise ValueError(
            f"parallel.world_size is {parallel.world_size} but torchrun started "
            f"{dist.get_world_size()} ranks; start as many ranks as the config says"
        )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tp_size,
        pipeline_model_parallel_size=parallel.pp_size,
        expert_model_parallel_size=parallel.ep_size,
        expert_tensor_parallel_size=parallel.etp_size,
    )
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def coordinates(num_experts: int, num_layers: int) -> ShardCoordinates:
    """Return this rank's coordinates in the trainer's layout."""
    local_experts = num_experts // parallel_state.get_expert_model_parallel_world_size()
    local_layers = num_layers // parallel_state.get_pipeline_model_parallel_world_size()
    return ShardCoordinates(
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        etp_size=parallel_state.get_expert_tensor_parallel_world_size(),
        first_expert=parallel_state.get_expert_model_parallel_rank() * local_experts,
        first_layer=parallel_state.get_pipeline_model_parallel_rank() * local_layers,
    )


def agree_any(flag: bool) -> bool:
    """Say whether the flag is set on any rank of the world."""
    agreed = torch.tensor([float(flag)])
    dist.all_reduce(agreed, op=dist.ReduceOp.MAX)
    return bool(agreed.item())
