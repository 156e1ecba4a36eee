"""A Slurm cluster on this machine for the tests of this folder, installed where there is none."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import one_machine
from tests.e2e import real_jobs

HERE = Path(__file__).parent


@pytest.fixture(scope="session")
def cluster() -> Iterator[one_machine.Cluster]:
    """Two nodes of eight would-be GPUs."""
    missing = one_machine.install()
    if missing:
        pytest.skip(missing)
    folder = Path(tempfile.mkdtemp(prefix="one-machine-slurm-"))
    folder.chmod(0o755)  # munge has a user of its own
    made = one_machine.Cluster(folder / "cluster")
    yield made
    made.close()
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def chat_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint with random weights and files of prompts."""
    made: Path = tmp_path_factory.mktemp("chat")
    script = HERE.parent / "e2e" / "chat_start.py"
    environment = real_jobs.environment()
    subprocess.run([sys.executable, str(script), str(made)], check=True, env=environment)
    return made
