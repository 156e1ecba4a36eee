"""Several `tiny_job`s on Slurm at once, each submitted and watched as `launch.py` does it.

    python launch_on_slurm.py FOLDER 'NAME ENDING OPTION...' ...

Each launch is a process of its own, forked after nemo-run's import, which takes seconds. It
leaves FOLDER/NAME/{pid,stdout,stderr,code} and the run's folder FOLDER/NAME/out.
"""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import recipes
from megatron_precision.cli.launch import parse
from megatron_precision.launch import jobs, options, slurm, slurm_watch
from megatron_precision.launch.jobs import Job


def main() -> None:
    folder, *launches = Path(sys.argv[1]).resolve(), *sys.argv[2:]
    jobs.load(folder / "home")
    children = []
    for line in launches:
        name, ending, *words = shlex.split(line)
        child = os.fork()
        if child == 0:
            os._exit(launch(folder / name, ending, words))
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def launch(folder: Path, ending: str, words: list[str]) -> int:
    """One launch, in its own process."""
    folder.mkdir()
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT), number)
    (folder / "pid").write_text(str(os.getpid()), encoding="ascii")
    args, _ = parse([*words, "--executor", "slurm"])
    config = recipes.build("sanity.tiny_dense", overrides=["parallel.rollout_tp_size=1"])
    chosen, problems = options.resolve(args, config)
    assert chosen is not None, problems
    out = folder / "out"
    out.mkdir()
    job = Job(ending, ("--out", str(out)), 2, out, module="tiny_job")
    code = slurm_watch.wait(slurm.submit([job], chosen))
    sys.stdout.flush()
    (folder / "code").write_text(str(code), encoding="ascii")
    return code


if __name__ == "__main__":
    main()
