"""Sizes of a job that a recipe has a layout for: `--gpus N --gpu-gb G`.

A test says that every layout fits; `python -m megatron_precision plan` works out the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.schema import ParallelConfig, RunConfig


@dataclass(frozen=True, order=True)
class Size:
    """Counts the GPUs of a job, and the GB (1e9 bytes) of each."""

    gpus: int
    gpu_gb: int

    def __str__(self) -> str:
        return f"{self.gpus} GPUs of {self.gpu_gb} GB"


@dataclass(frozen=True)
class Layout:
    """Divides a job of one size, and bounds its engines.

    Attributes:
        parallel: the layout of trainer and engines.
        kv_cache_mib: KV cache of a rank, in MiB.
        max_num_seqs: sequences that an engine decodes at once.
    """

    parallel: ParallelConfig
    kv_cache_mib: int
    max_num_seqs: int


Layouts = Mapping[Size, Layout]


@dataclass(frozen=True)
class Sized:
    """Holds a recipe's layouts, and the size that its plain name means."""

    layouts: Layouts
    default: Size

    def size(self, gpus: int | None, gpu_gb: int | None) -> Size:
        """Complete a size of which the user may have left out either number."""
        if gpus is None and gpu_gb is None:
            return self.default
        gpu_gb = gpu_gb or self.default.gpu_gb
        if gpus is None:
            gpus = min((s.gpus for s in self.layouts if s.gpu_gb == gpu_gb), default=8)
        return Size(gpus, gpu_gb)

    def like(self, size: Size) -> Layout:
        """Return the layout of another size that comes nearest: as many GPUs, or the fewest."""
        return self.layouts[min(self.layouts, key=lambda s: (s.gpus != size.gpus, s))]


class NoLayoutError(UserError):
    """A recipe has no layout of the size that the user asked for.

    Attributes:
        config: the recipe in its nearest layout.
        size: what was asked for.
    """

    def __init__(self, name: str, size: Size, sized: Sized, config: RunConfig) -> None:
        self.config = config
        self.size = size
        super().__init__(
            Problem(
                f"{name} has no layout for {size}",
                "--gpus, --gpu-gb",
                f"{size.gpus} and {size.gpu_gb}",
                f"one of: {'; '.join(map(str, sized.layouts))}",
            )
        )


# The sizes that `plan --all-sizes` asks of every large recipe.
SIZES = (Size(8, 80), Size(16, 80), Size(32, 80), Size(8, 141))


def layout(
    gpus: int,
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    rollout_tp: int,
    kv_gib: int,
    max_num_seqs: int = 256,
) -> Layout:
    """Write a layout in one line; sequence parallelism follows tensor parallelism."""
    return Layout(
        ParallelConfig(
            world_size=gpus,
            tp_size=tp,
            pp_size=pp,
            ep_size=ep,
            sequence_parallel=tp > 1,
            rollout_tp_size=rollout_tp,
        ),
        kv_gib * 1024,
        max_num_seqs,
    )
