"""Put on PYTHONPATH by the fault trials: one rank meets a fault in a phase of the run.

Python imports this module as it starts; it does nothing without the variable `FAULT`, in JSON:

    rank, phase, iteration   whose main thread ("all": any rank's) has just entered which phase
    after_s                  seconds from then on; the main thread may be inside a collective
    action                   a signal by name, or a function of this file

It hooks what the loop says to its watchdog, and touches nothing else of the project.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import json
import os
import signal
import sys
import threading
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

WATCHDOG = "megatron_precision.train.watchdog"


class Hook(importlib.abc.MetaPathFinder):
    """Waits for the watchdog to be imported."""

    def __init__(self, fault: dict[str, Any]) -> None:
        self._fault = fault

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != WATCHDOG:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def execute_and_hook(module: ModuleType) -> None:
            execute(module)
            hook(module.Watchdog, self._fault)

        spec.loader.exec_module = execute_and_hook  # type: ignore[method-assign]
        return spec


def hook(watchdog: Any, fault: dict[str, Any]) -> None:
    """Let the fault happen once, when the phase is entered."""
    original, done = watchdog._enter, threading.Event()

    def enter(self: Any, iteration: int, name: str) -> None:
        original(self, iteration, name)
        if not done.is_set() and (iteration, name) == (fault["iteration"], fault["phase"]):
            done.set()
            act = ACTIONS.get(fault["action"]) or _signal(fault["action"])
            if fault["after_s"]:
                timer = threading.Timer(fault["after_s"], act)
                timer.daemon = True
                timer.start()
            else:
                act()

    watchdog._enter = enter


def _signal(name: str) -> Any:
    return lambda: os.kill(os.getpid(), signal.Signals[name])


def raises() -> None:
    """A mistake in the rank's own code."""
    raise ZeroDivisionError("the original reason, of this rank")


def spins() -> None:
    """The main thread never comes back, and lives."""
    while True:
        threading.Event().wait(1.0)


def kills_torchrun() -> None:
    """The agent that started this rank."""
    os.kill(os.getppid(), signal.SIGKILL)


def nan_logprobs() -> None:
    """From now on the engine's first log-prob of every response is not a number."""
    import dataclasses

    engine = sys.modules["megatron_precision.rollout.vllm_engine"].VllmEngine
    original = engine._collect

    def collect(self: Any, output: Any) -> Any:
        rollout = original(self, output)
        values = (float("nan"), *rollout.rollout_logprobs[1:])
        return dataclasses.replace(rollout, rollout_logprobs=values)

    engine._collect = collect


ACTIONS = {
    "raises": raises,
    "spins": spins,
    "kills_torchrun": kills_torchrun,
    "nan_logprobs": nan_logprobs,
}


def main() -> None:
    fault = json.loads(os.environ["FAULT"])
    rank = os.environ.get("RANK")  # torchrun itself has none
    if rank is not None and fault["rank"] in (int(rank), "all"):
        sys.meta_path.insert(0, Hook(fault))


if "FAULT" in os.environ:
    main()
