"""What a distributed test hands to its ranks; imports neither an engine nor transformers."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from megatron_precision.actor.batch import Batch
from megatron_precision.config.schema import RunConfig


@dataclass
class Case:
    """One layout of one model, its weights by their names on disk, and a batch to run."""

    config: RunConfig
    tensors: dict[str, torch.Tensor]
    batch: Batch
