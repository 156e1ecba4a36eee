"""A run's folder belongs to one living run; what a dead one left can be resumed or replaced."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from megatron_precision.checkpoint import run_folder
from megatron_precision.config.errors import UserError

HOLDER = """
import os, sys, time
from pathlib import Path
from megatron_precision.checkpoint import run_folder
out = Path(sys.argv[1])
run_folder.claim(out)
run_folder.hold(out)
(out / "config.json").write_text("{}")
if os.fork() == 0:
    print(os.getpid(), flush=True)  # a writer that outlives the run
time.sleep(60)
"""


@pytest.mark.parametrize("way", ["", "overwrite", "resume"])
def test_a_second_run_is_refused_until_the_first_is_dead(way: str, tmp_path: Path) -> None:
    out = tmp_path / "run"
    root = Path(__file__).resolve().parents[2]
    words = [sys.executable, "-c", HOLDER, str(out)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, cwd=root) as holder:
        assert holder.stdout is not None
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(UserError, match="another run is writing there"):
                run_folder.claim(out, overwrite=way == "overwrite", resume=way == "resume")
            with pytest.raises(UserError, match="another run is writing there"):
                run_folder.hold(out)
            assert (out / "config.json").is_file(), "it was left alone"
            holder.kill()
            holder.wait()
            if way:
                run_folder.claim(out, overwrite=way == "overwrite", resume=way == "resume")
            else:
                with pytest.raises(UserError, match="the run folder exists"):
                    run_folder.claim(out)
            assert not run_folder.is_held(out)
        finally:
            holder.kill()
            subprocess.run(["kill", "-9", str(child)], check=True)
