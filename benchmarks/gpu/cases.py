"""What is measured, in order of priority: models, sizes, precisions and switches. No torch here."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import recipes
from megatron_precision.checks.layout import KV_BLOCK_TOKENS, kv_token_bytes
from megatron_precision.config.overrides import examine
from megatron_precision.config.schema import (
    TRANSFORMER_ENGINE_FUSIONS,
    ModelConfig,
    ParallelConfig,
    RunConfig,
)
from megatron_precision.layouts.architectures import QWEN3_30B_A3B
from megatron_precision.preflight import memory

# Sources of the shapes: the config.json of Qwen/Qwen3-1.7B and Qwen3-4B. The MoE is a slice of
# 30B-A3B: six of its 48 layers, so that weights and optimizer fit one GPU.
_QWEN3 = dataclasses.replace(
    QWEN3_30B_A3B, model_type="qwen3", num_experts=0, num_experts_per_tok=0,
    moe_intermediate_size=0, num_key_value_heads=8, tie_word_embeddings=True,
)  # fmt: skip
MODELS: dict[str, ModelConfig] = {
    "qwen3-1.7b": dataclasses.replace(
        _QWEN3, num_hidden_layers=28, num_attention_heads=16, intermediate_size=6144
    ),
    "qwen3-4b": dataclasses.replace(
        _QWEN3, hidden_size=2560, num_hidden_layers=36, intermediate_size=9728
    ),
    "qwen3-moe-slice": dataclasses.replace(QWEN3_30B_A3B, num_hidden_layers=6),
}
_TINY_MOE = ModelConfig(
    model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=96
)
TINY: dict[str, ModelConfig] = {
    "qwen3-1.7b": ModelConfig(),
    "qwen3-4b": ModelConfig(num_hidden_layers=3),
    "qwen3-moe-slice": _TINY_MOE,
}
PRECISIONS = ("fp16", "bf16")
# Tokens of a micro-batch of a trainer, as an H200 has room for without recomputation. With fewer
# the host is what is measured: it needs 170 to 210 ms to launch 28 layers and their gradients.
MICRO_BATCH_TOKENS = {"qwen3-1.7b": 16384, "qwen3-4b": 8192, "qwen3-moe-slice": 16384}
# Of an optimizer step; a real one has more, and its optimizer weighs less.
STEP_TOKENS = 65536
QUESTIONS, ROLLOUTS, QUESTION_TOKENS = 64, 2, 32
# Dense products of FP16 and BF16 without sparsity, by NVIDIA's data sheets.
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "B200": 2250e12}


@dataclass(frozen=True)
class Case:
    """One measure; its name is its file's.

    Attributes:
        kind: `train` steps the trainer alone; `engine` has both sides: audit, proof, rollouts,
            mismatch, sync, sleep and wake.
        model: a key of `MODELS`.
        precision: of both sides, or TRAIN/ROLLOUT.
        length: tokens of a sequence, prompt and response; of a row, where it is packed.
        switches: overrides that this case is about.
        packed: rows hold sequences of unlike lengths end to end.
        fused: with every fusion of the trainer that the platform has.
        shared_prompt: the first half of every sequence is the same, and cached: what cascade
            attention is for.
    """

    name: str
    kind: str
    model: str
    precision: str
    length: int
    switches: tuple[str, ...] = ()
    packed: bool = False
    fused: bool = False
    shared_prompt: bool = False


def _train(model: str, length: int, *, packed: bool = False, fused: bool = True) -> list[Case]:
    name = f"train-{model}-{length // 1024}k{'-packed' * packed}{'-fused' * fused}"
    return [
        Case(f"{name}-{p}", "train", model, p, length, packed=packed, fused=fused)
        for p in PRECISIONS
    ]


def _engine(
    model: str, precision: str, label: str = "", *switches: str, shared_prompt: bool = False
) -> Case:
    name = f"engine-{model}-{precision}{'-' if label else ''}{label}"
    length = 1024 if shared_prompt else 512
    return Case(name, "engine", model, precision, length, switches, shared_prompt=shared_prompt)


_DENSE = "qwen3-1.7b"
CASES: tuple[Case, ...] = (
    *_train(_DENSE, 16384, packed=True),
    *(_engine(_DENSE, precision) for precision in PRECISIONS),
    *_train(_DENSE, 4096),
    *_train(_DENSE, 4096, fused=False),
    *_train("qwen3-4b", 4096),
    *_train("qwen3-moe-slice", 4096),
    *(_engine("qwen3-moe-slice", precision) for precision in PRECISIONS),
    *(
        _engine(_DENSE, precision, label, switch)
        for label, switch in (
            ("cuda-graphs", "kernels.cuda_graphs=true"),
            ("fp32-head", "kernels.fp32_lm_head=true"),
        )
        for precision in PRECISIONS
    ),
    _engine(_DENSE, "fp32"),
    *(
        _engine(_DENSE, precision, label, switch, shared_prompt=True)
        for label, switch in (
            ("shared-prompt", "kernels.cascade_attention=false"),
            ("shared-prompt-cascade", "kernels.cascade_attention=true"),
        )
        for precision in PRECISIONS
    ),
    *_train(_DENSE, 16384),
    *_train("qwen3-4b", 16384),
    *_train("qwen3-moe-slice", 16384),
)
# What the CPU platform refuses: left out of a run there, and said so.
_GPU_ONLY = ("kernels.cuda_graphs", *(f"kernels.{name}" for name in TRANSFORMER_ENGINE_FUSIONS))
# Trainers that score what an engine has sampled, each with one thing changed.
_SWITCHES = {
    "fused-rope": "kernels.fused_rope=true",
    "fused-activation": "kernels.fused_activation=true",
    "fused-permute": "kernels.fused_permute=true",
    "local": "kernels.trainer=local",
}


def other_trainers(case: Case) -> dict[str, Case]:
    """By name, further trainers for the responses of an engine's case; it has none itself where
    it is about a switch of its own."""
    if case.kind != "engine" or case.switches:
        return {}
    rollout = case.precision
    found = {
        precision: dataclasses.replace(case, precision=f"{precision}/{rollout}")
        for precision in ("fp32", *PRECISIONS)
        if precision != rollout
    }
    if rollout in PRECISIONS:
        dense = not MODELS[case.model].num_experts
        found |= {
            name: dataclasses.replace(case, switches=(switch,))
            for name, switch in _SWITCHES.items()
            if not (dense and name == "fused-permute")
        }
    return found


def needs_gpu(case: Case) -> bool:
    """Whether a case is about something that the CPU platform has not."""
    return any(switch.startswith(_GPU_ONLY) for switch in case.switches)


def config(case: Case, *, tiny: bool, gpu: bool) -> RunConfig:
    """The configuration of a case.

    Args:
        tiny: models of a million weights and short sequences.
        gpu: whether it is for CUDA; sleep is then a part of it.

    Raises:
        UserError: for switches that the configuration has not.
    """
    model = (TINY if tiny else MODELS)[case.model]
    length = 128 if tiny else case.length  # the proof scores sequences of 78 tokens
    prompt = QUESTION_TOKENS + case.shared_prompt * length // 2
    values: dict[str, Any] = {
        "task.max_prompt_tokens": prompt,
        "rollout.max_response_tokens": length - prompt,
        "rollout.prefix_caching": str(case.shared_prompt).lower(),
        "rollout.record_routing": "false" if case.kind == "train" or gpu else "true",
        "train.micro_batch_size": _micro_batch_size(case, length, tiny),
        "train.micro_batch_tokens": length if case.packed else 0,
        "train.packed_sequences": str(case.packed).lower(),
        "memory.attention": "fused",
        "memory.recompute": "none" if tiny or length <= MICRO_BATCH_TOKENS[case.model] else "full",
        "memory.engine_sleep": "keep_weights" if gpu and case.kind == "engine" else "off",
    }
    base = dataclasses.replace(
        recipes.build("sanity.tiny_dense", case.precision),
        recipe=f"bench.{case.name}",
        model=dataclasses.replace(model, max_position_embeddings=max(256, length)),
        parallel=ParallelConfig(world_size=1, tp_size=1, rollout_tp_size=1),
    )
    # Every response has its place: one that is pushed out is sampled twice.
    tokens = (QUESTIONS * ROLLOUTS if case.kind == "engine" else 1) * (length + 2 * KV_BLOCK_TOKENS)
    values["rollout.kv_cache_mib"] = math.ceil(tokens * kv_token_bytes(base) / 2**20)
    overrides = [f"{path}={value}" for path, value in values.items()]
    built, problems = examine(base, [*overrides, *case.switches, *_fusions(case, gpu)])
    if problems:
        from megatron_precision.config.errors import UserError

        raise UserError(problems)
    return built


def _fusions(case: Case, gpu: bool) -> list[str]:
    if not case.fused:
        return []
    names = ("fused_activation", *(TRANSFORMER_ENGINE_FUSIONS if gpu else ()))
    experts = MODELS[case.model].num_experts > 0
    return [f"kernels.{name}=true" for name in names if experts or name != "fused_permute"]


def _micro_batch_size(case: Case, length: int, tiny: bool) -> int:
    if tiny:
        return 4
    if case.kind == "engine":
        return 8  # it is scored, not trained on
    return max(1, MICRO_BATCH_TOKENS[case.model] // length)


def needed_bytes(case: Case, config: RunConfig) -> int:
    """What a measure takes of a GPU by the estimate, without its reserve."""
    whole, parts = memory.of_trainer(config), memory.of_run(config)
    if case.kind == "train":
        return whole
    # Nothing goes backward.
    return (
        whole - parts.activations + parts.engine_weights + parts.kv_cache + parts.engine_workspace
    )


def shared_prompt_tokens(config: RunConfig) -> int:
    """Tokens that all prompts of a case begin with."""
    return config.task.max_prompt_tokens - QUESTION_TOKENS


def sequence_lengths(config: RunConfig) -> list[int]:
    """Tokens of each sequence of one optimizer step; packed ones have a long tail."""
    length, size = config.max_sequence_tokens, config.train.micro_batch_size
    row = [length]
    if config.train.packed_sequences:
        row, size = [length // 2, length // 4, length // 8, length // 8], 1
    return row * size * min(8, max(2, STEP_TOKENS // (length * size)))  # a tiny one has no more


def flops_per_token(model: ModelConfig, length: int) -> float:
    """Operations of one token, forward and backward, without recomputation: 6 a weight that is
    multiplied with it, and its attention, of which the causal mask leaves half."""
    heads = model.num_attention_heads * model.head_dim
    kv = model.num_key_value_heads * model.head_dim
    mlp = 3 * model.hidden_size * model.intermediate_size
    if model.num_experts:
        mlp = model.num_experts_per_tok * 3 * model.hidden_size * model.moe_intermediate_size
        mlp += model.hidden_size * model.num_experts
    layer = 2 * model.hidden_size * (heads + kv) + mlp
    weights = model.num_hidden_layers * layer + model.vocab_size * model.hidden_size
    attention = model.num_hidden_layers * 2 * heads * length  # half of 4 · heads · length
    return 6.0 * weights + 3.0 * attention


def peak_flops(device: str) -> float | None:
    """Of a device by its name; None for one that is not in the table."""
    return next((flops for name, flops in PEAK_FLOPS.items() if name in device), None)
