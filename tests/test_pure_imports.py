"""The pure packages import without the engines, and the config without torch.

Each case runs in a process of its own, since what pytest has imported would hide a dependency.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

TABLES = (
    "megatron_precision.checkpoint.compatible",
    "megatron_precision.checkpoint.folders",
    "megatron_precision.checkpoint.manifest",
    "megatron_precision.checkpoint.sidecar",
    "megatron_precision.observe.jumps",
    "megatron_precision.planning.command",
    "megatron_precision.planning.memory",
    "megatron_precision.planning.search",
    "megatron_precision.replay.command",
    "megatron_precision.replay.dump",
    "megatron_precision.replay.findings",
    "megatron_precision.replay.report",
    "megatron_precision.sync_bench.layouts",
    "megatron_precision.sync_bench.planned",
    "megatron_precision.weights.architectures",
    "megatron_precision.weights.families",
    "megatron_precision.weights.flat_ranges",
    "megatron_precision.weights.holdings",
    "megatron_precision.weights.hf_config",
    "megatron_precision.weights.megatron_checkpoint",
    "megatron_precision.weights.known_models",
    "megatron_precision.weights.megatron_layout",
    "megatron_precision.weights.plan",
    "megatron_precision.weights.regions",
    "megatron_precision.weights.traffic",
    "megatron_precision.weights.vllm_layout",
)
DATA_AND_REWARDS = tuple(
    f"megatron_precision.{folder}.{path.stem}"
    for folder in ("data", "rewards")
    for path in sorted((ROOT / "megatron_precision" / folder).glob("*.py"))
    if path.stem != "__init__"
)
PURE_MODULES = (
    "megatron_precision.config",
    "megatron_precision.precision.policy",
    "megatron_precision.rl.advantages",
    "megatron_precision.rl.aggregation",
    "megatron_precision.rl.algorithms",
    "megatron_precision.rl.correction",
    "megatron_precision.rl.limits",
    "megatron_precision.rl.losses",
    "megatron_precision.rl.mismatch",
    "megatron_precision.rl.reward_shaping",
    *DATA_AND_REWARDS,
    *TABLES,
)
TORCH_FREE_MODULES = (
    "megatron_precision.config",
    "megatron_precision.precision.policy",
    "megatron_precision.rl.algorithms",
    "megatron_precision.rl.limits",
    *DATA_AND_REWARDS,
    *TABLES,
)

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


def test_pure_modules_import_with_the_engines_blocked() -> None:
    imports = "".join(f"import {name}\n" for name in PURE_MODULES)
    result = run_python(BLOCK_ENGINES + imports)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("engine", ["megatron.core", "vllm", "transformers"])
def test_the_block_holds(engine: str) -> None:
    result = run_python(BLOCK_ENGINES + f"import {engine}\n")
    assert result.returncode == 1
    assert "ImportError: blocked engine" in result.stderr


def test_the_list_names_every_module_of_rl() -> None:
    on_disk = {
        f"megatron_precision.rl.{path.stem}"
        for path in (ROOT / "megatron_precision" / "rl").glob("*.py")
        if path.stem != "__init__"
    }
    assert on_disk <= set(PURE_MODULES)


@pytest.mark.parametrize("module", TORCH_FREE_MODULES)
def test_config_modules_import_no_torch(module: str) -> None:
    result = run_python(f"import sys\nimport {module}\nsys.exit('torch' in sys.modules)\n")
    assert result.returncode == 0, result.stderr or f"{module} imports torch"
