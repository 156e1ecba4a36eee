"""The pure packages import without the engines, and the config without torch.

Each case runs in a process of its own, since what pytest has imported would hide a dependency.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

PACKAGE = "megatron_precision"


def modules(*rooms: str) -> list[str]:
    """Every module of some rooms."""
    return [
        f"{PACKAGE}.{room}.{path.stem}"
        for room in rooms
        for path in sorted((ROOT / PACKAGE / room).glob("*.py"))
        if path.stem != "__init__"
    ]


# What the answers to a user's input are made of: no torch.
TORCH_FREE = [
    *modules("config", "checks", "cli", "data", "launch", "preflight", "rewards"),
    *(
        f"{PACKAGE}.{name}"
        for name in (
            "checkpoint.compatible", "checkpoint.folders", "checkpoint.manifest",
            "checkpoint.run_folder", "layouts.architectures", "layouts.hf_config",
            "layouts.megatron", "layouts.megatron_checkpoint", "layouts.regions", "layouts.vllm",
            "observe.dump", "observe.metrics", "precision.policy", "replay.findings",
            "rl.algorithms", "sync.families", "sync.flat_ranges", "sync.plan", "sync.traffic",
        )
    ),
    "benchmarks.sync.parameters",
    "recipes",
]  # fmt: skip
# These need torch, and no engine.
ENGINE_FREE = modules("rl")

BLOCK_ENGINES = """
import importlib.abc
import sys


class EngineBlocker(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname, path=None, target=None):
        if fullname.partition(".")[0] in ("megatron", "vllm", "transformers"):
            raise ImportError("blocked engine: " + fullname)
        return None


sys.meta_path.insert(0, EngineBlocker())
"""


def run_python(source: str) -> subprocess.CompletedProcess[str]:
    """Run `source` in a fresh interpreter that sees the checkout."""
    return subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_algorithms_import_with_the_engines_blocked() -> None:
    imports = "".join(f"import {name}\n" for name in [*TORCH_FREE, *ENGINE_FREE])
    result = run_python(BLOCK_ENGINES + imports)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("engine", ["megatron.core", "vllm", "transformers"])
def test_the_block_holds(engine: str) -> None:
    result = run_python(BLOCK_ENGINES + f"import {engine}\n")
    assert result.returncode == 1
    assert "ImportError: blocked engine" in result.stderr


def test_what_answers_a_users_input_imports_no_torch() -> None:
    """One process for all: the first module that imports torch is named."""
    source = f"""
import importlib, sys
for name in {TORCH_FREE!r}:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(name + " imports torch")
"""
    result = run_python(source)
    assert result.returncode == 0, result.stderr
