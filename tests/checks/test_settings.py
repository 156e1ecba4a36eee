"""What a configuration must satisfy before anything starts.

Each expected limit is worked by hand from the tiny models' sizes, or is a rule that Megatron
Core or vLLM states itself.
"""

from __future__ import annotations

import pytest

import recipes
from megatron_precision.checks import settings
from megatron_precision.config import overrides
from megatron_precision.config.errors import UserError
from megatron_precision.rl.algorithms import ALGORITHMS

# The sizes that the numbers below are worked from, whatever the recipes' own are.
SIZES = {
    "sanity.tiny_dense": [
        "model.num_hidden_layers=4",
        "model.num_attention_heads=8",
        "model.num_key_value_heads=4",
        "model.intermediate_size=384",
        "model.max_position_embeddings=256",
        "task.max_prompt_tokens=32",
        "rollout.max_response_tokens=96",
        "rollout.max_num_seqs=512",
        "train.prompts_per_iteration=64",
        "train.prompts_per_mini_batch=16",
        "perfectible.accuracy_high=0.8",
    ],
    "sanity.tiny_moe": ["model.num_experts=8", "model.num_experts_per_tok=2"],
}


def where(recipe: str, *changes: str) -> list[str]:
    config = overrides.apply(recipes.build(recipe, overrides=SIZES[recipe]), changes)
    return [problem.where for problem in settings.settings_problems(config)]


@pytest.mark.parametrize("name", list(recipes.RECIPES))
@pytest.mark.parametrize("precision", ["fp16", "bf16", "fp32", "bf16/fp16"])
def test_every_recipe_is_valid_in_every_precision(name: str, precision: str) -> None:
    assert settings.settings_problems(recipes.build(name, precision=precision)) == []


@pytest.mark.parametrize("name", list(recipes.RECIPES))
@pytest.mark.parametrize("algo", list(ALGORITHMS))
def test_every_recipe_is_valid_with_every_algorithm(name: str, algo: str) -> None:
    assert settings.settings_problems(recipes.build(name, algo=algo)) == []


def test_all_problems_of_a_layout_are_listed_at_once() -> None:
    found = where(
        "sanity.tiny_dense",
        "parallel.world_size=15",
        "parallel.tp_size=5",
        "parallel.pp_size=3",
        "parallel.ep_size=2",
        "parallel.rollout_tp_size=7",
        "model.intermediate_size=383",
        "train.prompts_per_mini_batch=15",
    )
    assert found == [
        "model.num_attention_heads by parallel.tp_size",
        "model.num_key_value_heads by parallel.tp_size",
        "model.intermediate_size by parallel.tp_size",
        "model.num_hidden_layers by parallel.pp_size",
        "parallel.ep_size",
        "parallel.world_size by parallel.rollout_tp_size",
        "model.num_attention_heads by parallel.rollout_tp_size",
        "model.intermediate_size by parallel.rollout_tp_size",
        "model.vocab_size by parallel.rollout_tp_size",
        "model.num_key_value_heads by parallel.rollout_tp_size",
        "train.prompts_per_iteration by train.prompts_per_mini_batch",
    ]


@pytest.mark.parametrize(
    "changes",
    [
        ["parallel.world_size=1", "parallel.tp_size=1", "parallel.rollout_tp_size=1"],
        ["parallel.tp_size=1", "parallel.pp_size=2"],
        ["parallel.tp_size=1"],
        ["parallel.sequence_parallel=true"],
        # A vocabulary is padded, and the hidden size is not split: neither has to divide.
        ["model.vocab_size=31"],
        ["model.hidden_size=127"],
        # vLLM repeats KV heads when tensor parallelism exceeds them.
        [
            "model.num_attention_heads=8",
            "model.num_key_value_heads=4",
            "parallel.world_size=8",
            "parallel.tp_size=4",
            "parallel.rollout_tp_size=8",
        ],
    ],
)
def test_a_layout_that_runs_is_not_refused(changes: list[str]) -> None:
    assert where("sanity.tiny_dense", *changes) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["parallel.sequence_parallel=true", "parallel.tp_size=1"], "parallel.sequence_parallel"),
        (
            ["parallel.world_size=3", "parallel.rollout_tp_size=1"],
            "parallel.world_size by tp_size * pp_size",
        ),
        (["model.num_experts=8"], "model.model_type, model.num_experts"),
        (["train.dump_jump_factor=1"], "train.dump_jump_factor"),
        (["train.dump_weights_gib=-1"], "train.dump_weights_gib"),
        (["model.head_dim=31"], "model.head_dim"),
        (["train.routing_replay=true"], "train.routing_replay"),
        (["model.model_type=qwen2", "model.head_dim=64"], "model.head_dim"),
        (["parallel.world_size=0"], "parallel.world_size"),
        (["train.micro_batch_size=0"], "train.micro_batch_size"),
        (["train.micro_batch_tokens=-1"], "train.micro_batch_tokens"),
        (["train.micro_batch_tokens=127"], "train.micro_batch_tokens"),
        (["train.iterations=-1"], "train.iterations"),
        (["eval.every=-1"], "eval.every"),
        (["optimizer.beta2=1"], "optimizer.beta2"),
        (["precision=fp61"], "precision"),
        (["algo.name=GSPO"], "algo.name"),
        (["algo.clip_low=1"], "algo.clip_low"),
        (["algo.sequence_clip_low=1"], "algo.sequence_clip_low"),
        (["algo.sequence_clip_high=0"], "algo.sequence_clip_high"),
        (["algo.dual_clip=1"], "algo.dual_clip"),
        (["algo.correction_threshold=0.5"], "algo.correction_threshold"),
        (["algo.token_mask_low=1.5"], "algo.token_mask_low"),
        (["algo.token_mask_low=0"], "algo.token_mask_low"),
        (["algo.token_mask_high=0.9"], "algo.token_mask_high"),
        (["algo.overlong_buffer_share=1.1"], "algo.overlong_buffer_share"),
        (["algo.overlong_penalty=-1"], "algo.overlong_penalty"),
        (["algo.dynamic_sampling_rounds=-1"], "algo.dynamic_sampling_rounds"),
        (["algo.name=DAPO", "train.rollouts_per_prompt=1"], "train.rollouts_per_prompt"),
        (["rollout.temperature=0"], "rollout.temperature"),
        (["loss_scale.initial_scale=1000"], "loss_scale.initial_scale"),
        (["loss_scale.min_scale=0"], "loss_scale.min_scale"),
        (["loss_scale.initial_scale=0.5"], "loss_scale.initial_scale"),
        (
            ["perfectible.accuracy_low=0.9"],
            "perfectible.accuracy_low, perfectible.accuracy_high",
        ),
        (["rollout.max_num_batched_tokens=100"], "rollout.max_num_batched_tokens"),
        (["memory.recompute_modules=mpl"], "memory.recompute_modules"),
        (["memory.recompute_modules=mlp,moe_act"], "memory.recompute_modules"),
        (["memory.optimizer_offload=1.5"], "memory.optimizer_offload"),
        (["precision=fp32", "memory.offload_trainer=true"], "memory.offload_trainer"),
        (["kernels.trainer=local", "kernels.fused_rope=true"], "kernels.fused_rope"),
    ],
)
def test_one_mistake_is_one_problem(changes: list[str], expected: str) -> None:
    assert where("sanity.tiny_dense", *changes) == [expected]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["parallel.tp_size=2"], "parallel.sequence_parallel"),
        (["model.num_experts=7"], "model.num_experts by parallel.ep_size"),
        (["model.num_experts_per_tok=9"], "model.num_experts_per_tok"),
        (["model.num_experts_per_tok=0"], "model.num_experts_per_tok"),
        (["parallel.ep_size=4"], "parallel.world_size by etp_size * ep_size * pp_size"),
        (
            ["train.rollouts_per_prompt=1", "train.prompts_per_mini_batch=1"],
            "train.prompts_per_mini_batch * train.rollouts_per_prompt by the data-parallel size",
        ),
        (["warm_start.batch_size=127"], "warm_start.batch_size by the data-parallel size"),
    ],
)
def test_one_mistake_of_an_moe_is_one_problem(changes: list[str], expected: str) -> None:
    assert where("sanity.tiny_moe", *changes) == [expected]


def test_an_impossible_size_hides_no_other_problem_and_makes_none() -> None:
    # TP 3 divides neither the 8 heads nor the rest; a world of 0 says nothing of the other sizes.
    changes = ["parallel.world_size=0", "parallel.tp_size=3", "parallel.pp_size=3"]
    assert where("sanity.tiny_dense", *changes) == [
        "parallel.world_size",
        "model.num_attention_heads by parallel.tp_size",
        "model.num_key_value_heads by parallel.tp_size",
        "model.num_hidden_layers by parallel.pp_size",
    ]
    assert where("sanity.tiny_dense", "parallel.tp_size=0") == ["parallel.tp_size"]
    assert where("sanity.tiny_dense", "model.head_dim=-1") == ["model.head_dim"]


def test_a_vocabulary_that_vllm_pads_to_64_must_divide_over_its_ranks() -> None:
    """vLLM asserts it (`divide` in vocab_parallel_embedding.py): 64 rows over 6 ranks."""
    changes = [
        "parallel.world_size=6",
        "parallel.tp_size=1",
        "parallel.rollout_tp_size=6",
        "model.num_attention_heads=12",
        "model.num_key_value_heads=6",
        "train.prompts_per_iteration=48",
        "train.prompts_per_mini_batch=12",
        "warm_start.batch_size=36",
    ]
    assert where("sanity.tiny_dense", *changes) == ["model.vocab_size by parallel.rollout_tp_size"]


def test_a_start_from_a_checkpoint_has_no_warm_start_batch_to_divide() -> None:
    config = overrides.apply(recipes.build("dense14b.dapo"), ["parallel.world_size=512"])
    assert config.warm_start.batch_size % config.parallel.dp_size
    assert settings.settings_problems(config) == []


def test_moe_with_tensor_parallelism_runs_with_sequence_parallelism() -> None:
    changes = ["parallel.tp_size=2", "parallel.ep_size=2", "parallel.sequence_parallel=true"]
    assert where("sanity.tiny_moe", *changes) == []


@pytest.mark.parametrize(("prompt", "fits"), [(32, True), (33, False)])
def test_prompt_and_response_must_fit_the_positions(prompt: int, fits: bool) -> None:
    changes = ["model.max_position_embeddings=128", "rollout.max_response_tokens=96"]
    found = where("sanity.tiny_dense", f"task.max_prompt_tokens={prompt}", *changes)
    assert (found == []) is fits


@pytest.mark.parametrize(("mib", "fits"), [(4, True), (3, False)])
def test_the_kv_cache_must_hold_one_sequence(mib: int, fits: bool) -> None:
    # 2 (K, V) x 4 layers x 2 KV heads a rank x 128 x 2 bytes = 4096 bytes a token; 896 tokens
    # are 7 blocks of 128, and one more stays empty: 1024 tokens, 4 MiB.
    changes = [
        "model.num_hidden_layers=4",
        "model.num_key_value_heads=4",
        "model.head_dim=128",
        "model.max_position_embeddings=1024",
        "rollout.max_response_tokens=864",
        "task.max_prompt_tokens=32",
    ]
    found = where("sanity.tiny_dense", f"rollout.kv_cache_mib={mib}", *changes)
    assert (found == []) is fits


def test_check_returns_the_configuration_or_raises_with_every_problem() -> None:
    good = recipes.build("sanity.tiny_dense")
    assert settings.check(good) is good
    bad = recipes.build("sanity.tiny_dense", overrides=["seed=-1", "rollout.temperature=0"])
    with pytest.raises(UserError) as caught:
        settings.check(bad)
    assert len(caught.value.problems) == 2
