"""Which part of a rank's memory is there in which phase of an iteration.

An iteration goes training → sync → rollout. In this version nothing sleeps and nothing is moved
to host memory: trainer, engine and KV cache stay where they are, and only what a pass needs comes
and goes. Trainer and engine share one caching allocator, which keeps what a phase frees and may
have it in pieces that the next phase cannot use. So the verdict counts all parts at once.

Where parts are moved, the order that needs least is: wake the engine's weights, sync, take the
trainer away, wake the KV cache. A configuration that does so has its rows in `_states`, and its
verdict is the largest phase.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from megatron_precision.config import RunConfig
from megatron_precision.planning.memory import Memory

Phase = Literal["training", "sync", "rollout"]
PHASES: tuple[Phase, ...] = ("training", "sync", "rollout")
# used: the phase works with it. kept: it stays and is not worked with. freed: its allocator has
# it, for whoever asks next.
State = Literal["used", "kept", "freed"]


def states(config: RunConfig) -> dict[str, dict[Phase, State]]:
    """Part of `Memory` → its state in each phase."""
    return {part: dict(zip(PHASES, row, strict=True)) for part, row in _states(config).items()}


def _states(config: RunConfig) -> dict[str, tuple[State, State, State]]:
    sent: State = "used" if config.policy.wire_source == "main_copies" else "kept"
    return {
        "parameters": ("used", "used", "kept"),
        "gradients": ("used", "kept", "kept"),
        "optimizer": ("used", sent, "kept"),
        "activations": ("used", "freed", "freed"),
        "logits": ("used", "freed", "freed"),
        "engine_weights": ("kept", "used", "used"),
        "kv_cache": ("kept", "kept", "used"),
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
            if rows[part.name][phase] != "freed"
        )
        for phase in PHASES
    }


def needed(config: RunConfig, found: Memory) -> int:
    """Bytes that a GPU must have for a rank: of all parts, while none is moved away."""
    return found.total


def says(config: RunConfig) -> str:
    """What the states mean for what has to fit."""
    return (
        "All parts at once have to fit: nothing sleeps and nothing is offloaded in this version, "
        "`kept` parts stay on the GPU, and of `freed` ones the allocator keeps the memory."
    )


def dump_copy_bytes(config: RunConfig, found: Memory, weights: int) -> int:
    """Host memory of a rank for the weights of a dump (`train.dump_weights_gib`).

    Args:
        weights: bytes of the whole model.
    """
    train = config.train
    dumps = train.dump_every > 0 or (train.dump_jump_factor > 0 and train.dump_jumps_at_most > 0)
    return found.parameters if dumps and weights <= train.dump_weights_gib * 2**30 else 0
