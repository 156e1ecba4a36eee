"""The audit, on hand-made readings and on the real trainer and engine."""

from __future__ import annotations

import pytest
import torch

from megatron_precision.precision.audit import PrecisionAuditError, Reading, check
from megatron_precision.precision.dtypes import dtype_name
from megatron_precision.precision.policy import policy
from tests.distributed.engine_worlds import WRONG, engine_world, every_world


def test_readings_that_agree_are_summed_up_by_kind() -> None:
    readings = [
        Reading("params", "a", torch.float32),
        Reading("params", "b", torch.float32),
        Reading("kv_cache", "c", torch.float16),
    ]
    assert check(readings, policy("fp32/fp16")) == {"params": "fp32", "kv_cache": "fp16"}


def test_every_reading_that_disagrees_is_listed_with_what_the_policy_says() -> None:
    readings = [
        Reading("params", "first", torch.bfloat16),
        Reading("params", "second", torch.float16),
        Reading("router", "third", torch.float64),
    ]
    with pytest.raises(PrecisionAuditError) as raised:
        check(readings, policy("fp16"))
    message = str(raised.value)
    assert "2 tensors disagree" in message
    assert "first: bf16, but the policy fp16 says fp16 for params" in message
    assert "third: float64, but the policy fp16 says fp32 for router" in message
    assert "second" not in message


@every_world
def test_the_audit_of_a_real_run_finds_what_the_policy_says(world: str) -> None:
    model, precision = world.split()
    decided = (
        "params", "grads", "lm_head", "rollout_params", "rollout_lm_head", "kv_cache", "wire",
    )  # fmt: skip
    expected = dict.fromkeys(decided, precision) | {
        "grad_accumulate": "fp32",
        "main_params": "fp32",
    }
    if model == "MoE":
        expected["router"] = "fp32"
    assert engine_world(world)["dtypes"] == expected


@every_world
def test_a_cast_parameter_and_a_wrong_kv_cache_are_both_listed(world: str) -> None:
    message = engine_world(world)["audit"]
    wrong = dtype_name(WRONG[world.split()[1]])
    assert "2 tensors disagree" in message
    assert f"decoder.final_layernorm.weight: {wrong}" in message
    assert f"KV cache of layer 1: {wrong}" in message
