"""Which part of a rank's memory is where in which phase of an iteration.

An iteration goes training → sync → rollout (`train/hand_over.py`). By default nothing sleeps and
nothing is moved to host memory: trainer, engine and KV cache stay where they are, and only what a
pass needs comes and goes. Trainer and engine share one caching allocator, which keeps what a
phase frees and may have it in pieces that the next phase cannot use. So all parts at once count.

With `memory.engine_sleep` the engine gives its KV cache and weights back while the trainer works:
the weights are awake for the sync, the KV cache for the rollout alone. With
`memory.offload_trainer` parameters and optimizer are on the host, and gradients nowhere, while the
engine samples. Memory that is handed over has left the allocator: the largest phase counts.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from megatron_precision.config import RunConfig
from megatron_precision.planning.memory import Memory, of_stage

Phase = Literal["training", "sync", "rollout"]
PHASES: tuple[Phase, ...] = ("training", "sync", "rollout")
# used: the phase works with it. kept: it stays and is not worked with. freed: its allocator has
# it, for whoever asks next. host: it is in the host's memory. gone: given back to the device.
State = Literal["used", "kept", "freed", "host", "gone"]
_AWAY = ("freed", "host", "gone")


def states(config: RunConfig) -> dict[str, dict[Phase, State]]:
    """Part of `Memory` → its state in each phase."""
    return {part: dict(zip(PHASES, row, strict=True)) for part, row in _states(config).items()}


def _states(config: RunConfig) -> dict[str, tuple[State, State, State]]:
    sent: State = "used" if config.policy.wire_source == "main_copies" else "kept"
    sleep, offload = config.memory.engine_sleep, config.memory.offload_trainer
    asleep: dict[str, State] = {"off": "kept", "keep_weights": "host", "drop_weights": "gone"}
    cache: State = "kept" if sleep == "off" else "gone"
    aside: State = "host" if offload else "kept"
    return {
        "parameters": ("used", "used", aside),
        "gradients": ("used", "kept", "gone" if offload else "kept"),
        "optimizer": ("used", sent, aside),
        "activations": ("used", "freed", "freed"),
        "logits": ("used", "freed", "freed"),
        "engine_weights": (asleep[sleep], "used", "used"),
        "kv_cache": (cache, cache, "used"),
        "engine_workspace": ("freed", "freed", "used"),
        "sync_buffers": ("kept", "used", "kept"),
        "reserve": ("used", "used", "used"),
    }


def totals(config: RunConfig, found: Memory) -> dict[Phase, int]:
    """Bytes that are allocated in each phase at most, what the allocator keeps left out."""
    rows = states(config)
    return {
        phase: sum(
            getattr(found, part.name)
            for part in dataclasses.fields(found)
            if rows[part.name][phase] not in _AWAY
        )
        for phase in PHASES
    }


def needed(config: RunConfig, found: Memory) -> int:
    """Bytes that a GPU must have for a rank: of the largest phase where parts are handed over."""
    return max(totals(config, found).values()) if _hands_over(config) else found.total


def _hands_over(config: RunConfig) -> bool:
    return config.memory.engine_sleep != "off" or config.memory.offload_trainer


def says(config: RunConfig) -> str:
    """What the states mean for what has to fit."""
    if _hands_over(config):
        return (
            "The largest phase has to fit: what a phase frees is given back before the other side "
            "takes memory. `host` parts wait in host memory, `gone` ones are made anew. What sleep "
            "gives back was measured (docs/benchmarks/gpu.md), a whole turn was not."
        )
    return (
        "All parts at once have to fit: nothing sleeps and nothing steps aside here "
        "(memory.engine_sleep, memory.offload_trainer), `kept` parts stay on the GPU, and of "
        "`freed` ones the allocator keeps the memory."
    )


def host_bytes(config: RunConfig, stage: int) -> int:
    """Host memory of a rank for what lives or waits there, at most; it is pinned."""
    all_here = dataclasses.replace(config.memory, optimizer_offload=0.0)
    whole = of_stage(dataclasses.replace(config, memory=all_here), stage).optimizer
    found, rows = of_stage(config, stage), states(config)
    waiting: list[int] = [
        sum(getattr(found, part) for part, row in rows.items() if row[phase] == "host")
        for phase in PHASES
    ]
    return whole - found.optimizer + max(waiting)


def dump_copy_bytes(config: RunConfig, found: Memory, weights: int) -> int:
    """Host memory of a rank for the weights of a dump (`train.dump_weights_gib`).

    Args:
        weights: bytes of the whole model.
    """
    train = config.train
    dumps = train.dump_every > 0 or (train.dump_jump_factor > 0 and train.dump_jumps_at_most > 0)
    return found.parameters if dumps and weights <= train.dump_weights_gib * 2**30 else 0
