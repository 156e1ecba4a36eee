"""The order in which trainer and engine take memory from each other.

Neither side can step aside on a CPU: a recorder stands for both. tests/gpu does it for real.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest

import recipes
from megatron_precision.train.session import Offloader

RETURN = ["engine.sleep()", "optimizer.come_back()"]
AWAY = ["optimizer.step_aside()", "engine.wake('kv_cache')"]


def recorded(sleep: Any, offload: bool) -> tuple[Offloader, mock.Mock]:
    config = recipes.build("sanity.tiny_dense", "fp16")
    memory = dataclasses.replace(config.memory, engine_sleep=sleep, offload_trainer=offload)
    session = mock.Mock()
    session.engine.weight_version = 7
    session.actor.model.buffers = session.actor.model.expert_parallel_buffers = []
    return Offloader(session, dataclasses.replace(config, memory=memory)), session


def calls(session: mock.Mock) -> list[str]:
    words = [str(call).removeprefix("call.").removeprefix("actor.") for call in session.mock_calls]
    session.reset_mock()
    return words


def test_a_turn_wakes_weights_for_the_sync_and_the_cache_when_the_trainer_is_aside() -> None:
    offloader, session = recorded("keep_weights", offload=True)
    offloader.reload_trainer()  # the first time it never was aside
    assert calls(session) == ["engine.sleep()"]
    offloader.wake_engine_weights()
    offloader.offload_trainer()
    assert calls(session) == ["engine.wake('weights')", *AWAY]
    offloader.reload_trainer()
    assert calls(session) == RETURN


@pytest.mark.parametrize("sleep", ["keep_weights", "drop_weights"])
def test_an_engine_that_forgets_its_weights_gets_them_again_after_a_checkpoint(sleep: str) -> None:
    offloader, session = recorded(sleep, offload=True)
    offloader.offload_trainer()
    assert calls(session) == AWAY
    with offloader.trainer_on_device():
        assert calls(session) == RETURN
    pushed = ["sync.push(7)"] if sleep == "drop_weights" else []
    assert calls(session) == ["engine.wake('weights')", *pushed, *AWAY]


def test_with_nothing_to_offloader_the_trainer_is_always_there() -> None:
    offloader, session = recorded("off", offload=False)
    offloader.offload_trainer()
    assert calls(session) == ["engine.wake('kv_cache')"]
    with offloader.trainer_on_device():
        assert calls(session) == []
    assert calls(session) == []
