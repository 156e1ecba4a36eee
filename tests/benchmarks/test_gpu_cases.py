"""Every measure is a configuration that runs, of the size that its name says."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from benchmarks.gpu import cases
from megatron_precision.actor.packing import Packing, padding_share, plan_micro_batches
from megatron_precision.checks import platform, settings
from megatron_precision.config.schema import to_dict
from megatron_precision.layouts.architectures import hf_shapes
from megatron_precision.platform.choice import Choice
from megatron_precision.preflight import memory


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_a_measure_is_valid_here_and_on_a_gpu(case: cases.Case) -> None:
    for tiny in (True, False):
        for gpu in (True, False):
            assert settings.settings_problems(cases.config(case, tiny=tiny, gpu=gpu)) == []
    found = list(
        platform.platform_problems(cases.config(case, tiny=True, gpu=False), Choice("cpu", "test"))
    )
    assert bool(found) == cases.needs_gpu(case)


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_a_measure_fits_a_gpu_by_the_estimate(case: cases.Case) -> None:
    needed = cases.needed_bytes(case, cases.config(case, tiny=False, gpu=True))
    assert needed + memory.RESERVE_BYTES < 149e9  # an H200, as torch sees it
    if case.model == "qwen3-1.7b" and case.kind == "engine" and case.precision != "fp32":
        assert needed + memory.RESERVE_BYTES < 84e9  # an H100


def test_every_response_of_a_measure_has_its_place_in_the_kv_cache() -> None:
    # By hand: 28 layers, keys and values, 8 heads of 128, two bytes; 64 questions, 2 responses.
    case = next(case for case in cases.CASES if case.name == "engine-qwen3-1.7b-fp16")
    config = cases.config(case, tiny=False, gpu=True)
    assert config.rollout.kv_cache_mib * 2**20 >= 64 * 2 * 512 * 28 * 2 * 8 * 128 * 2
    assert config.rollout.max_num_seqs >= 64 * 2


def test_cascade_attention_has_a_prompt_to_share() -> None:
    # vLLM's flash_attn.use_cascade_attention asks for 256 tokens and a cached prefix.
    for case in (case for case in cases.CASES if "cascade" in case.name):
        config = cases.config(case, tiny=False, gpu=True)
        assert cases.shared_prompt_tokens(config) == 512
        assert config.rollout.prefix_caching
        assert config.kernels.cascade_attention


def test_the_pairs_of_a_measure_differ_in_precision_alone() -> None:
    by_name = {case.name: case for case in cases.CASES}
    assert len(by_name) == len(cases.CASES)
    for name, case in by_name.items():
        if case.precision != "fp16":
            continue
        other = by_name[name.replace("fp16", "bf16")]
        one, two = (to_dict(cases.config(c, tiny=False, gpu=True)) for c in (case, other))
        assert (one.pop("precision"), two.pop("precision")) == ("fp16", "bf16")
        assert one.pop("recipe") != two.pop("recipe")
        assert one == two


def test_a_packed_measure_fills_its_rows_and_pads_nothing() -> None:
    packed = next(
        case for case in cases.CASES if case.name == "train-qwen3-1.7b-16k-packed-fused-fp16"
    )
    config = cases.config(packed, tiny=False, gpu=True)
    lengths = torch.tensor(cases.sequence_lengths(config))
    assert sorted(lengths.tolist()) == [2048] * 8 + [4096] * 4 + [8192] * 4
    train = config.train
    packing = Packing(
        1, train.micro_batch_size, train.micro_batch_tokens, 8, packed=train.packed_sequences
    )
    (plan,) = plan_micro_batches(lengths, torch.arange(len(lengths)), packing)
    assert [micro.packed_tokens for micro in plan] == [16384] * 4
    assert padding_share(lengths, [plan]) == 0
    padded = next(case for case in cases.CASES if case.name == "train-qwen3-1.7b-4k-fp16")
    assert cases.sequence_lengths(cases.config(padded, tiny=False, gpu=True)) == [4096] * 16


def test_the_models_have_the_weights_that_their_names_say() -> None:
    def billions(name: str) -> float:
        return sum(math.prod(shape) for shape in hf_shapes(cases.MODELS[name]).values()) / 1e9

    assert round(billions("qwen3-1.7b"), 2) == 1.72
    assert round(billions("qwen3-4b"), 2) == 4.02


def test_operations_are_six_a_weight_and_half_the_square_of_attention() -> None:
    # By hand: 28 layers of 2048 × (2048 + 1024) × 2 + 3 × 2048 × 6144, a head of 151936 × 2048,
    # and 3 × 28 × (4 × 2048 × 4096 / 2).
    dense = cases.MODELS["qwen3-1.7b"]
    weights = 28 * (2048 * 3072 * 2 + 3 * 2048 * 6144) + 151936 * 2048
    assert cases.flops_per_token(dense, 4096) == 6 * weights + 3 * 28 * 8192 * 4096 / 2
    shorter = cases.flops_per_token(dataclasses.replace(dense, num_hidden_layers=27), 4096)
    assert shorter < cases.flops_per_token(dense, 4096)


def test_a_peak_is_known_by_the_devices_name_or_not_at_all() -> None:
    assert cases.peak_flops("NVIDIA H200") == 989e12
    assert cases.peak_flops("CPU, 2 cores") is None


@pytest.mark.parametrize("case", cases.CASES, ids=lambda case: case.name)
def test_other_trainers_are_valid_and_differ_from_the_engines_in_one_thing(
    case: cases.Case,
) -> None:
    own = to_dict(cases.config(case, tiny=False, gpu=True))
    for other in cases.other_trainers(case).values():
        config = cases.config(other, tiny=False, gpu=True)
        assert settings.settings_problems(config) == []
        assert list(platform.platform_problems(config, Choice("cuda", "test"))) == []
        assert config.model == cases.config(case, tiny=False, gpu=True).model
        found = to_dict(config)
        changed = [name for name in found if found[name] != own[name]]
        assert changed in (["precision"], ["kernels"])
