"""`python launch_on_slurm.py ENDING OUT OPTION...`: `tiny_job` on Slurm, as launch.py submits."""

from __future__ import annotations

import sys
from pathlib import Path

import recipes
from megatron_precision.launching import Job, command, options, slurm, slurm_watch


def main() -> int:
    ending, out, *words = sys.argv[1:]
    args, _ = command.parse([*words, "--executor", "slurm"])
    config = recipes.build("sanity.tiny_dense", overrides=["parallel.rollout_tp_size=1"])
    chosen, problems = options.resolve(args, config)
    assert chosen is not None, problems
    folder = Path(out)
    folder.mkdir(parents=True)
    job = Job(ending, ("--out", out), 2, folder, module="tiny_job")
    return slurm_watch.wait(slurm.submit([job], config, chosen))


if __name__ == "__main__":
    sys.exit(main())
