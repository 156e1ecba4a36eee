"""The order in which trainer and engine take memory from each other.

Neither side can step aside on a CPU: a recorder stands for both. tests/gpu does it for real.
"""

from __future__ import annotations

import dataclasses
from typing import Any
from unittest import mock

import pytest

import recipes
from megatron_precision.train.session import HandOver

RETURN = ["engine.sleep()", "optimizer.come_back()"]
AWAY = ["optimizer.step_aside()", "engine.wake('kv_cache')"]


def recorded(sleep: Any, offload: bool) -> tuple[HandOver, mock.Mock]:
    config = recipes.build("sanity.tiny_dense", "fp16")
    memory = dataclasses.replace(config.memory, engine_sleep=sleep, offload_trainer=offload)
    session = mock.Mock()
    session.engine.weight_version = 7
    session.actor.model.buffers = session.actor.model.expert_parallel_buffers = []
    return HandOver(session, dataclasses.replace(config, memory=memory)), session


def calls(session: mock.Mock) -> list[str]:
    words = [str(call).removeprefix("call.").removeprefix("actor.") for call in session.mock_calls]
    session.reset_mock()
    return words


def test_a_turn_wakes_weights_for_the_sync_and_the_cache_when_the_trainer_is_aside() -> None:
    hand_over, session = recorded("keep_weights", offload=True)
    hand_over.to_trainer()  # the first time it never was aside
    assert calls(session) == ["engine.sleep()"]
    hand_over.before_sync()
    hand_over.to_engine()
    assert calls(session) == ["engine.wake('weights')", *AWAY]
    hand_over.to_trainer()
    assert calls(session) == RETURN


@pytest.mark.parametrize("sleep", ["keep_weights", "drop_weights"])
def test_an_engine_that_forgets_its_weights_gets_them_again_after_a_checkpoint(sleep: str) -> None:
    hand_over, session = recorded(sleep, offload=True)
    hand_over.to_engine()
    assert calls(session) == AWAY
    with hand_over.trainer_present():
        assert calls(session) == RETURN
    pushed = ["sync.push(7)"] if sleep == "drop_weights" else []
    assert calls(session) == ["engine.wake('weights')", *pushed, *AWAY]


def test_with_nothing_to_hand_over_the_trainer_is_always_there() -> None:
    hand_over, session = recorded("off", offload=False)
    hand_over.to_engine()
    assert calls(session) == ["engine.wake('kv_cache')"]
    with hand_over.trainer_present():
        assert calls(session) == []
    assert calls(session) == []
