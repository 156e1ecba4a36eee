"""Worlds of trainer and engine that several test files read; each is run once a session."""

from __future__ import annotations

import dataclasses
import functools
import tempfile
from typing import Any

import pytest
import torch

from megatron_precision.config.schema import (
    LossScaleConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    SyncConfig,
    TaskConfig,
    TrainConfig,
)
from tests.distributed.harness import run_distributed
from tests.distributed.oracle import checkpoint, random_hf_model
from tests.shared import once

# vLLM pads the vocabulary to 128, so that the second rank holds both rows and padding; head and
# expert sizes are such as its CPU kernels take.
DENSE = ModelConfig(
    vocab_size=75,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
)
MOE = dataclasses.replace(
    DENSE,
    model_type="qwen3_moe",
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
)
LAYOUTS = {
    "dense": (DENSE, ParallelConfig(2, 2)),
    "MoE": (MOE, ParallelConfig(2, 1, 1, 2)),
}
WRONG = {"fp16": torch.bfloat16, "bf16": torch.float16}

# One world of each model and of each dtype by default, the other two behind `slow`.
SLOW = ("dense bf16", "MoE fp16")
every_world = pytest.mark.parametrize(
    "world",
    ["dense fp16", "MoE bf16", *(pytest.param(world, marks=pytest.mark.slow) for world in SLOW)],
)


def config(world: str) -> RunConfig:
    model, precision = world.split()
    return RunConfig(
        "test",
        precision=precision,
        model=LAYOUTS[model][0],
        parallel=LAYOUTS[model][1],
        task=TaskConfig(difficulty=4, train_questions=32),
        # So few tokens a step that some prompts wait for the next one.
        rollout=RolloutConfig(kv_cache_mib=32, max_num_seqs=64, max_num_batched_tokens=72),
        loss_scale=LossScaleConfig("fixed_start", initial_scale=64.0),
        train=TrainConfig(micro_batch_size=16),
    )


@functools.cache
def weights(model: str) -> dict[str, torch.Tensor]:
    """Random weights, of which every dtype holds the same values."""
    built = random_hf_model(LAYOUTS[model][0], scale=0.1)
    tensors = checkpoint(LAYOUTS[model][0], built)
    tensors = {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
    for tensor in tensors.values():
        if tensor.ndim > 1:
            tensor.view(-1)[5::101] = -0.0  # what a small negative weight may be rounded to
    return tensors


@functools.cache
def engine_world(world: str) -> dict[str, Any]:
    """The results of `engine_bodies.experiments` on two ranks."""
    return once(f"engine_world {world}", lambda: _engine_world(world))


def _engine_world(world: str) -> dict[str, Any]:
    model, precision = world.split()
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = run_distributed(
            "engine_bodies.experiments",
            2,
            config(world),
            weights(model),
            WRONG[precision],
            folder,
        )
    return found


@functools.cache
def fresh_world(world: str) -> list[list[float]]:
    """The scores of an engine that has loaded the weights that the other world pushed."""
    return once(f"fresh_world {world}", lambda: _fresh_world(world))


def _fresh_world(world: str) -> list[list[float]]:
    push = engine_world(world)["push"]
    with tempfile.TemporaryDirectory() as folder:
        found: list[list[float]] = run_distributed(
            "engine_bodies.fresh_scores",
            2,
            config(world),
            push["exported"],
            push["prompts"],
            folder,
        )
    return found


@functools.cache
def mismatch_world(world: str) -> dict[str, torch.Tensor]:
    """Log-probs of the same tokens by the engine and by the trainer."""
    return once(f"mismatch_world {world}", lambda: _mismatch_world(world))


def _mismatch_world(world: str) -> dict[str, torch.Tensor]:
    if world in SLOW:
        found: dict[str, torch.Tensor] = engine_world(world)["mismatch"]
        return found
    with tempfile.TemporaryDirectory() as folder:
        found = run_distributed(
            "engine_bodies.mismatch_alone", 2, config(world), weights(world.split()[0]), folder
        )
    return found


def flips_world(world: str) -> dict[str, Any]:
    """The results of `engine_bodies.flips_alone` on two ranks."""
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = run_distributed(
            "engine_bodies.flips_alone", 2, config(world), weights(world.split()[0]), folder
        )
    return found


@functools.cache
def main_copies_world() -> dict[str, Any]:
    """Two replicas of an MoE model that trains in BF16, and rolls out in FP16 by main copies."""
    return once("main_copies_world", lambda: _main_copies_world())


def _main_copies_world() -> dict[str, Any]:
    changed = dataclasses.replace(
        config("MoE bf16"),
        model=dataclasses.replace(MOE, max_position_embeddings=512),
        precision="bf16/fp16",
        parallel=ParallelConfig(2, 1, rollout_tp_size=1),
        sync=SyncConfig("main_copies"),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        # Room for a prompt of two blocks of vLLM's KV cache on the CPU.
        rollout=RolloutConfig(
            kv_cache_mib=32, max_response_tokens=384, prefix_caching=True, record_routing=False
        ),
    )
    with tempfile.TemporaryDirectory() as folder:
        found: dict[str, Any] = run_distributed(
            "engine_bodies.synced_main_copies", 2, changed, weights("MoE"), folder
        )
    return found
