"""A Slurm cluster on this machine for the tests of this folder, installed where there is none."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest


def _load(path: Path) -> ModuleType:
    # Test folders are not packages; a helper is loaded by its path, under a name of its own.
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


HERE = Path(__file__).parent
one_machine = _load(HERE / "one_machine.py")
for helper in (HERE.parent / "e2e" / "real_jobs.py", HERE / "chat_run.py"):
    if helper.stem not in sys.modules:
        _load(helper)


@pytest.fixture(scope="session")
def cluster() -> Iterator[one_machine.Cluster]:  # type: ignore[name-defined]
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
    import subprocess

    import real_jobs

    made: Path = tmp_path_factory.mktemp("chat")
    script = HERE.parent / "e2e" / "chat_start.py"
    environment = real_jobs.environment()
    subprocess.run([sys.executable, str(script), str(made)], check=True, env=environment)
    return made
