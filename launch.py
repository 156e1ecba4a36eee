"""Launch a recipe through nemo-run: on this machine, on a Slurm cluster, or elsewhere.

    python launch.py sanity.tiny_dense --precision fp16 --algo PG-Seq-IS --out runs/x
    python launch.py dense14b.dapo --executor slurm --nodes 2 --gpus-per-node 8 --out /lustre/x \\
        --account A --partition batch --time 04:00:00 --container-image IMAGE \\
        start.checkpoint=/lustre/models/qwen3-14b-base

It makes the warm start first when the cache has none, then trains, and exits with 0 only when
the run succeeded. docs/launching.md has the options.
"""

from __future__ import annotations

import sys

from megatron_precision.cli import launch

if __name__ == "__main__":
    sys.exit(launch.main(sys.argv[1:]))
