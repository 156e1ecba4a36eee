"""Sizes of a job that a recipe has a layout for: `--gpus N --gpu-gb G`.

A size that a recipe has no layout for is one that its model does not fit: `python -m
megatron_precision plan` works out the memory, and a test that every layout here fits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from megatron_precision.config.schema import ParallelConfig


@dataclass(frozen=True, order=True)
class Size:
    """GPUs of a job, and GB (1e9 bytes) of each."""

    gpus: int
    gpu_gb: int

    def __str__(self) -> str:
        return f"{self.gpus} GPUs of {self.gpu_gb} GB"


@dataclass(frozen=True)
class Layout:
    """How a job of one size is divided, and what its engines may hold.

    Attributes:
        parallel: of trainer and engines.
        kv_cache_mib: of a rank.
        max_num_seqs: that an engine decodes at once.
    """

    parallel: ParallelConfig
    kv_cache_mib: int
    max_num_seqs: int


Layouts = Mapping[Size, Layout]


@dataclass(frozen=True)
class Sized:
    """A recipe's layouts, and the size that its plain name means."""

    layouts: Layouts
    default: Size

    def size(self, gpus: int | None, gpu_gb: int | None) -> Size:
        """The size that a user means who may have left out either number."""
        if gpus is None and gpu_gb is None:
            return self.default
        gpu_gb = gpu_gb or self.default.gpu_gb
        if gpus is None:
            gpus = min((s.gpus for s in self.layouts if s.gpu_gb == gpu_gb), default=8)
        return Size(gpus, gpu_gb)

    def like(self, size: Size) -> Layout:
        """The layout of another size that comes nearest: of as many GPUs, or of the fewest."""
        return self.layouts[min(self.layouts, key=lambda s: (s.gpus != size.gpus, s))]


# What every large recipe is asked for.
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
    """A layout in one line; sequence parallelism goes with tensor parallelism."""
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
