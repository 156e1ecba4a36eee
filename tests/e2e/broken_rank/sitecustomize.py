"""Put on PYTHONPATH by test_faults.py: rank 1 of a job raises inside the loop, at its third step.

Python imports this module as it starts. It waits for the trainer to be imported and wraps its
`step`; no other rank and no other method is touched.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

TRAINER = "megatron_precision.train.iteration"
GOOD_STEPS = 2


class Breaker(importlib.abc.MetaPathFinder):
    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != TRAINER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_break(module: ModuleType) -> None:
            execute(module)
            break_steps(module.Trainer)

        spec.loader.exec_module = execute_and_break  # type: ignore[method-assign]
        return spec


def break_steps(trainer: Any) -> None:
    original, calls = trainer.step, [0]

    def step(self: Any, *args: Any) -> None:
        calls[0] += 1
        if calls[0] > GOOD_STEPS:
            raise ZeroDivisionError("the original reason, of rank 1")
        original(self, *args)

    trainer.step = step


if os.environ.get("RANK") == "1":
    sys.meta_path.insert(0, Breaker())
