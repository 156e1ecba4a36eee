"""What the code runs on: a CUDA GPU, or a CPU as a platform of its own right."""

from __future__ import annotations

import random


def start(seed: int) -> str:
    """Prepare this process for the engines; call it first, once, before they are imported.

    Returns:
        The torch.distributed backend of this platform.

    Raises:
        UpstreamChangedError: where an upstream name that the CPU platform patches has gone.
    """
    # Imported here: a launcher and `--help` read this package's `process` without torch.
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    if torch.cuda.is_available():
        return "nccl"
    from megatron_precision.platform import cpu, process

    process.adopt_job()
    cpu.apply_megatron_patches()
    return "gloo"
