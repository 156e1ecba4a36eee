"""No module of the package imports, at any depth and at any time, one that imports it."""

from __future__ import annotations

import ast
import graphlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def imports(package: str) -> dict[str, set[str]]:
    """Every module, with those of the package that it names: at the top, late, or for types."""
    paths = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
        for path in (ROOT / package).rglob("*.py")
    }
    found: dict[str, set[str]] = {name: set() for name in paths}
    for name, path in paths.items():
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                named = {f"{node.module}.{alias.name}" for alias in node.names}
                found[name] |= named & paths.keys() or {node.module} & paths.keys()
            elif isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names} & paths.keys()
    return found


def test_imports_run_one_way() -> None:
    graph = imports("megatron_precision")
    assert len(graph["megatron_precision.cli"]) > 5  # imports are seen, those in functions too
    list(graphlib.TopologicalSorter(graph).static_order())  # a CycleError names the circle
