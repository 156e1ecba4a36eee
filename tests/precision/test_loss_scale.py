"""The dynamic loss scale, by sequences worked by hand."""

from __future__ import annotations

import json

import pytest
import torch

from megatron_precision.platform import cpu
from megatron_precision.precision.loss_scale import LossScale

# What Megatron's scaler asks of a device; undone after each test, so that others see plain torch.
NEEDED = {("torch", "tensor"), ("torch.cuda", "current_device"), ("torch:Tensor", "cuda")}


@pytest.fixture(autouse=True)
def scaler_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = {"torch": torch, "torch.cuda": torch.cuda, "torch:Tensor": torch.Tensor}
    for patch in cpu.MEGATRON_PATCHES:
        if (patch.owner, patch.attribute) in NEEDED:
            owner = owners[patch.owner]
            original = getattr(owner, patch.attribute)
            monkeypatch.setattr(owner, patch.attribute, patch.make(original))


def walk(scale: LossScale, flags: str) -> list[float]:
    """The scale after each step; `x` is an overflow, `.` a good step."""
    values = []
    for flag in flags:
        scale.commit(flag == "x")
        values.append(scale.value)
    return values


def test_an_overflow_halves_the_scale_at_once_with_a_hysteresis_of_one() -> None:
    scale = LossScale(1024.0, growth_interval=100, hysteresis=1, min_value=1.0)
    assert walk(scale, ".x.xx") == [1024, 512, 512, 256, 128]


def test_growth_doubles_after_every_full_interval_of_good_steps() -> None:
    scale = LossScale(8.0, growth_interval=3, hysteresis=1, min_value=1.0)
    assert walk(scale, ".......") == [8, 8, 16, 16, 16, 32, 32]


def test_an_overflow_starts_the_growth_interval_anew() -> None:
    scale = LossScale(8.0, growth_interval=3, hysteresis=1, min_value=1.0)
    assert walk(scale, "..x...") == [8, 8, 4, 4, 4, 8]


def test_hysteresis_lets_single_overflows_pass_and_a_good_step_restores_it() -> None:
    scale = LossScale(64.0, growth_interval=100, hysteresis=2, min_value=1.0)
    # Megatron's own scaler would halve at the second overflow although good steps lie between.
    assert walk(scale, "x.x.x.") == [64] * 6
    assert walk(scale, "xx") == [64, 32]


def test_once_hysteresis_is_used_up_every_further_overflow_in_the_row_halves() -> None:
    scale = LossScale(64.0, growth_interval=100, hysteresis=3, min_value=1.0)
    assert walk(scale, "xxxxx") == [64, 64, 32, 16, 8]


def test_the_scale_never_falls_below_its_minimum() -> None:
    scale = LossScale(8.0, growth_interval=100, hysteresis=1, min_value=4.0)
    assert walk(scale, "xxx") == [4, 4, 4]


def test_members_look_at_the_scale_and_move_nothing() -> None:
    scale = LossScale(256.0, growth_interval=1, hysteresis=1, min_value=1.0)
    scale.update(True)
    scale.update(False)
    assert scale.value == 256
    assert scale.scale.item() == 256
    assert scale.inv_scale.item() == 1 / 256
    assert scale.scale.dtype == scale.inv_scale.dtype == torch.float32
    assert scale.scale.shape == scale.inv_scale.shape == (1,)


@pytest.mark.parametrize("flags", ["", "..", ".x", "xx.", "x"])
def test_a_restored_scale_goes_on_as_the_saved_one(flags: str) -> None:
    def fresh() -> LossScale:
        return LossScale(32.0, growth_interval=4, hysteresis=2, min_value=1.0)

    saved = fresh()
    walk(saved, flags)
    restored = fresh()
    restored.load_state_dict(saved.state_dict())
    assert restored.state_dict() == saved.state_dict()
    assert walk(restored, "x..xx......") == walk(saved, "x..xx......")


@pytest.mark.parametrize("cut", range(9))
def test_a_restored_scale_goes_on_as_it_would_have(cut: int) -> None:
    flags = "..x.xx..."
    straight = LossScale(64.0, growth_interval=3, hysteresis=2, min_value=1.0)
    expected = walk(straight, flags)
    first = LossScale(64.0, growth_interval=3, hysteresis=2, min_value=1.0)
    begun = walk(first, flags[:cut])
    second = LossScale(1024.0, growth_interval=3, hysteresis=2, min_value=1.0)
    second.restore(json.loads(json.dumps(first.state())))
    assert begun + walk(second, flags[cut:]) == expected
    assert second.state() == straight.state()


def test_a_scale_at_its_minimum_has_no_way_down() -> None:
    scale = LossScale(4.0, growth_interval=100, hysteresis=1, min_value=2.0)
    assert not scale.at_minimum
    walk(scale, "x")
    assert scale.at_minimum
