"""The wheel: it has everything that runs outside a checkout, and its console scripts run there."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
DATA = (
    "megatron_precision/launch/slurm_setup.sh",
    "megatron_precision/mismatch/questions.jsonl",
    "megatron_precision/mismatch/report.html.j2",
    "megatron_precision/report/base.html.j2",
    "megatron_precision/report/report.css",
    "megatron_precision/report/report.html.j2",
    "recipes/moe/__init__.py",
    "tools/checkpoint_convert/cli.py",
)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the files that git knows, so that nothing else gets into it."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split("\n")
    for name in filter(None, listed):
        if name.startswith(("megatron_precision/", "recipes/", "tools/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(out), str(source)], check=True)
    (found,) = out.glob("*.whl")
    return found


def test_it_has_the_package_data_the_recipes_and_the_converter_and_no_tests(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    assert set(DATA) <= names
    assert {name.partition("/")[0] for name in names if ".dist-info" not in name} == {
        "megatron_precision", "recipes", "tools",
    }  # fmt: skip


def test_its_console_scripts_run_outside_the_checkout(wheel: Path, tmp_path: Path) -> None:
    """In an environment of its own, beside the pinned packages of this one."""
    venv.create(tmp_path / "env", with_pip=False)
    (packages,) = (tmp_path / "env" / "lib").glob("python*/site-packages")
    pinned = next(path for path in sys.path if path.endswith("site-packages"))
    # A path alone: .pth files in it, such as that of the checkout, are not read.
    (packages / "pinned.pth").write_text(f"{pinned}\n", encoding="utf-8")
    python = tmp_path / "env" / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet"]
    subprocess.run([*install, "--no-deps", "--no-index", str(wheel)], check=True)
    (tmp_path / "elsewhere").mkdir()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run(program: str, *words: str) -> str:
        done = subprocess.run(
            [str(tmp_path / "env" / "bin" / program), *words],
            cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True,
            timeout=120, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    where = "import megatron_precision, recipes; print(megatron_precision.__file__)"
    assert str(tmp_path) in run("python", "-c", where)
    assert "sync-bench" in run("megatron-precision", "--help")
    assert "import" in run("checkpoint-convert", "--help")
    shown = run("megatron-precision", "train", "sanity.tiny_dense", "--out", "run", "--dryrun")
    assert json.JSONDecoder().raw_decode(shown)[0]["recipe"] == "sanity.tiny_dense"
    assert "would run:" in shown
    assert not list((tmp_path / "elsewhere").iterdir())
