"""The plan against numbers worked by hand and against the tables that the weight sync reads."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path

import pytest

import recipes
from benchmarks.gpu.tables import recorded_config
from benchmarks.sync.parameters import engine_parameters, trainer_parameters
from megatron_precision.config.schema import MemoryConfig, ParallelConfig, RunConfig
from megatron_precision.layouts.architectures import hf_shapes
from megatron_precision.preflight import memory
from megatron_precision.sync.families import RolloutLayout, TrainerLayout

ROOT = Path(__file__).resolve().parents[2]


def one_rank(recipe: str) -> RunConfig:
    layout = ParallelConfig(1, 1, rollout_tp_size=1)
    return dataclasses.replace(recipes.build(recipe), parallel=layout)


@pytest.mark.parametrize(
    ("recipe", "parameters"),
    [
        # 2 × 151,936 × 5,120 + 5,120 + 40 × (2 × 5,120 + 2 × 128 + 5,120 × 128 × (40 + 16)
        # + 5,120 × 5,120 + 3 × 5,120 × 17,408)
        ("dense14b.dapo", 14_768_307_200),
        # 2 × 151,936 × 2,048 + 2,048 + 48 × (2 × 2,048 + 2 × 128 + 2,048 × 128 × (32 + 8)
        # + 4,096 × 2,048 + 128 × 2,048 + 128 × 3 × 2,048 × 768)
        ("moe.grpo_seq_mis", 30_532_122_624),
        # 2 × 151,936 × 1,536 + 1,536 + 28 × (2 × 1,536 + (1,536 + 1) × 128 × (12 + 4)
        # + 1,536 × 1,536 + 3 × 1,536 × 8,960)
        ("sanity.r1d_1_5b", 1_777_088_000),
        # 128,256 × 3,072 + 3,072 + 28 × (2 × 3,072 + 3,072 × 128 × (24 + 16) + 3,072 × 3,072
        # + 3 × 3,072 × 8,192)
        ("octothinker.octothinker_3b", 3_212_749_824),
    ],
)
def test_one_rank_holds_the_published_number_of_parameters(recipe: str, parameters: int) -> None:
    config = one_rank(recipe)
    held = memory.trainer_elements(config, 0)
    # No vocabulary here needs padding: 151,936 and 128,256 are multiples of 64.
    assert held.dense + held.expert == parameters
    assert memory.engine_elements(config) == parameters
    assert sum(math.prod(shape) for shape in hf_shapes(config.model).values()) == parameters


@pytest.mark.parametrize(
    "layout",
    [
        ParallelConfig(8, 4, 2, 4, 1, True, 4),
        ParallelConfig(8, 2, 2, 2, 2, True, 8),
        ParallelConfig(16, 4, 4, 4, 1, True, 2),
    ],
)
def test_every_stage_holds_what_the_weight_sync_counts(layout: ParallelConfig) -> None:
    config = recipes.build("moe.grpo_seq_mis")
    model = dataclasses.replace(config.model, num_hidden_layers=4, num_experts=8)
    config = dataclasses.replace(config, model=model, parallel=layout)
    side = TrainerLayout(
        layout.world_size, layout.tp_size, layout.pp_size, layout.ep_size, layout.etp_size
    )
    for stage in range(layout.pp_size):
        rank = stage * layout.world_size // layout.pp_size
        sizes = [(h.name, math.prod(h.shape)) for h in trainer_parameters(model, side, rank)]
        expert = sum(size for name, size in sizes if ".experts." in name)
        held = memory.trainer_elements(config, stage)
        assert (held.dense, held.expert) == (sum(size for _, size in sizes) - expert, expert)
    engine = RolloutLayout(layout.world_size, layout.rollout_tp_size)
    counted = sum(math.prod(h.shape) for h in engine_parameters(model, engine, 0))
    assert memory.engine_elements(config) == counted


def test_the_last_stage_has_its_own_copy_of_tied_embeddings() -> None:
    config = one_rank("octothinker.octothinker_3b")
    config = dataclasses.replace(config, parallel=ParallelConfig(2, 1, 2, rollout_tp_size=1))
    first, last = (memory.trainer_elements(config, stage).dense for stage in (0, 1))
    assert last - first == 3072  # the final norm
    assert first + last == 3_212_749_824 + 128_256 * 3072


def test_state_of_a_dense_model_is_worked_by_hand() -> None:
    """14,768,307,200 parameters over TP 8: 1,846,410,240 a rank, norms of each whole."""
    config = recipes.build("dense14b.dapo")
    norms = 40 * (2 * 5120 + 2 * 128) + 5120
    held = (14_768_307_200 - norms) // 8 + norms
    found = memory.of_run(config)
    assert found.parameters == 2 * held
    assert found.gradients == 4 * held
    assert found.optimizer == 12 * held  # DP is 1
    # 8 KV heads over 8 ranks: 1 head × (keys, values) × 40 layers × 128 × 2 bytes a token.
    assert memory.kv_token_bytes(config) == 1 * 2 * 40 * 128 * 2
    # 22,528 tokens × 151,936 / 8 columns × three 2-byte copies, and on a CPU 16 bytes of FP32.
    assert found.logits == 22_528 * (151_936 // 8) * 6
    assert memory.of_run(config, "cpu").logits == 22_528 * (151_936 // 8) * 22


def test_experts_state_is_shared_by_their_own_data_parallelism() -> None:
    """TP 4 × EP 8 over 16 ranks: 4 replicas of the dense part, 2 of the experts'."""
    config = recipes.build("moe.grpo_seq_mis")
    config = dataclasses.replace(config, parallel=ParallelConfig(16, 4, 1, 8, 1, True, 8))
    held = memory.trainer_elements(config, 0)
    assert held.expert == 48 * 16 * 3 * 2048 * 768
    assert memory.of_run(config).optimizer == 12 * (held.dense // 4 + held.expert // 2)


@pytest.mark.parametrize(("precision", "a_parameter"), [("fp16", 2 + 4 + 12), ("fp32", 4 + 4 + 8)])
def test_bytes_of_a_parameter_follow_the_precision(precision: str, a_parameter: int) -> None:
    config = dataclasses.replace(one_rank("sanity.r1d_1_5b"), precision=precision)
    found = memory.of_run(config)
    state = found.parameters + found.gradients + found.optimizer
    assert state == a_parameter * 1_777_088_000


def test_rollouts_in_fp32_double_engine_and_cache_of_a_token() -> None:
    half = recipes.build("dense14b.dapo", "bf16")
    wide = recipes.build("dense14b.dapo", "bf16/fp32")
    assert memory.of_run(wide).engine_weights == 2 * memory.of_run(half).engine_weights
    assert memory.kv_sequences(wide) == memory.kv_sequences(half) / 2


def test_scores_grow_with_the_square_of_the_length_and_fused_attention_does_not() -> None:
    config = recipes.build("dense14b.dapo")

    def layer(attention: str, response: int) -> int:
        rollout = dataclasses.replace(config.rollout, max_response_tokens=response)
        changed = dataclasses.replace(
            config,
            rollout=rollout,
            memory=MemoryConfig("full", attention=attention),
            train=dataclasses.replace(config.train, micro_batch_size=1, micro_batch_tokens=0),
        )
        return memory.layer_activations(changed)

    short, long = 6144, 14336  # with the prompt's 2,048, 8,192 and twice that
    assert layer("fused", long) == 2 * layer("fused", short)
    scores = [layer("scores", n) - layer("fused", n) for n in (short, long)]
    assert scores[0] == 8 * 5 * 8192**2  # 40 heads over 8 ranks
    assert scores[1] == 4 * scores[0]


MEASURED = ROOT / "docs/benchmarks/raw/gpu_h200"


@pytest.mark.parametrize("path", sorted(MEASURED.glob("train-*.json")), ids=lambda path: path.stem)
def test_what_a_gpu_needed_is_what_is_planned(path: Path) -> None:
    found = json.loads(path.read_text(encoding="utf-8"))
    config = recorded_config(found)
    assert config is not None
    plan = memory.of_run(config)
    state = plan.parameters + plan.gradients + plan.optimizer
    assert abs(found["memory"]["allocated_bytes"] / state - 1) < 0.01
    planned = memory.of_trainer(config)
    assert abs(found["memory"]["peak_allocated_bytes"] / planned - 1) < 0.02


def test_a_budget_of_tokens_bounds_a_micro_batch_of_any_sequences() -> None:
    config = recipes.build("dense14b.dapo")

    def activations(**sizes: int) -> int:
        train = dataclasses.replace(config.train, **sizes)
        return memory.of_run(dataclasses.replace(config, train=train)).activations

    by_count = activations(micro_batch_size=2, micro_batch_tokens=0)
    assert activations(micro_batch_size=9, micro_batch_tokens=2 * 22_528) == by_count
    assert activations(micro_batch_size=9, micro_batch_tokens=22_528) < by_count


def test_one_packed_row_needs_no_copy_of_its_logits_with_the_batch_first() -> None:
    config = recipes.build("dense14b.dapo")
    train = dataclasses.replace(config.train, packed_sequences=True)
    packed = memory.of_run(dataclasses.replace(config, train=train)).logits
    columns = 151_936 // config.parallel.tp_size
    assert memory.of_run(config).logits - packed == 22_528 * columns * 2


def test_a_first_stage_has_most_micro_batches_under_way() -> None:
    config = recipes.build("moe.grpo_seq_mis")
    found = [memory.of_stage(config, stage) for stage in range(4)]
    kept = 12 * 2 * 22_528 * 2048 // 4  # layers' inputs of one micro-batch
    fewer = [a.activations - b.activations for a, b in itertools.pairwise(found)]
    assert fewer == [kept] * 3
    assert [bool(stage.logits) for stage in found] == [False, False, False, True]


@pytest.mark.parametrize("recipe", ["dense14b.dapo", "moe.grpo_seq_mis"])
def test_more_tensor_parallelism_never_needs_more_of_any_part(recipe: str) -> None:
    config = recipes.build(recipe)
    experts = config.model.num_experts > 0
    found = []
    for tp in (1, 2, 4):
        layout = ParallelConfig(32, tp, 1, 8 if experts else 1, 1, tp > 1, tp)
        found.append(memory.of_run(dataclasses.replace(config, parallel=layout)))
    for less, more in itertools.pairwise(found):
        assert more.total < less.total
        for part in ("parameters", "gradients", "activations", "logits", "engine_weights"):
            assert getattr(more, part) < getattr(less, part)
