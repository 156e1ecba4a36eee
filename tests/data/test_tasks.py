"""Sets by name, the order of prompts, what ends a response; whole runs are in tests/e2e."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_precision.config.errors import UserError
from megatron_precision.config.schema import TaskConfig
from megatron_precision.data.arithmetic import make_questions
from megatron_precision.data.mixture import prompts_for_iteration
from megatron_precision.data.prompts import PromptSet, parse_set, set_problems
from megatron_precision.data.tasks import PromptOrder, arithmetic_task, stop_ids


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("math=a/b.parquet", PromptSet("math", Path("a/b.parquet"), 1.0)),
        ("math=b.jsonl@0.5", PromptSet("math", Path("b.jsonl"), 0.5)),
        ("m=/data/me@home/b.jsonl", PromptSet("m", Path("/data/me@home/b.jsonl"), 1.0)),
        ("m=x=y.jsonl@2", PromptSet("m", Path("x=y.jsonl"), 2.0)),
    ],
)
def test_a_set_is_a_name_a_path_and_a_weight(text: str, expected: PromptSet) -> None:
    assert parse_set(text) == expected


@pytest.mark.parametrize("text", ["", "a.jsonl", "=a.jsonl", "a=", "a b=c", "a=b@0", "a=b@nan"])
def test_what_is_no_set_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="NAME=PATH"):
        parse_set(text)


def test_every_wrong_set_and_every_repeated_name_is_reported() -> None:
    found = list(set_problems("task.train_sets", ["a=1", "b", "a=2", "=c"]))
    assert [problem.got for problem in found] == ["'b'", "'=c'", "a, 2 times"]


def test_the_only_set_of_a_task_comes_in_the_plain_order_however_it_is_cut() -> None:
    config = TaskConfig(difficulty=3)
    questions = make_questions(config, split="train", count=7, seed=2)
    order = PromptOrder(arithmetic_task(config, questions, seed=5), seed=5)
    for iteration in range(5):
        indices = prompts_for_iteration(7, iteration, 4, seed=5)
        assert [p.id for p in order.take(4)] == [questions[i].id for i in indices]


def test_orders_of_different_uses_differ() -> None:
    config = TaskConfig(difficulty=3)
    task = arithmetic_task(config, make_questions(config, split="train", count=20, seed=2), seed=5)
    first, other = (PromptOrder(task, 5, stream).take(20) for stream in ("order", "other"))
    assert {p.id for p in first} == {p.id for p in other}
    assert [p.id for p in first] != [p.id for p in other]


def test_a_response_is_text_without_the_token_that_ended_it_and_with_any_other() -> None:
    config = TaskConfig(difficulty=3)
    task = arithmetic_task(config, make_questions(config, split="train", count=1, seed=2), seed=5)
    (end,) = task.stop_ids
    tokens = task.train[""].prompts[0].tokens
    assert task.text((*tokens, end)) == task.text(tokens) == task.train[""].prompts[0].text
    assert task.text((end, 0, *tokens)).startswith("<eos><pad>")


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, (7,)),
        ({"eos_token_id": 7}, (7,)),
        ({"eos_token_id": [9, 7]}, (7, 9)),
        ({"eos_token_id": None}, (7,)),
    ],
)
def test_the_generation_config_adds_tokens_that_end_a_turn(
    tmp_path: Path, values: dict[str, object], expected: tuple[int, ...]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps(values), encoding="utf-8")
    assert stop_ids(tmp_path, 7) == expected


def test_without_a_generation_config_the_tokenizers_token_ends_a_response(tmp_path: Path) -> None:
    assert stop_ids(tmp_path, 7) == (7,)


@pytest.mark.parametrize("text", ["[]", "{", '{"eos_token_id": "x"}', '{"eos_token_id": [true]}'])
def test_a_damaged_generation_config_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "generation_config.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=r"generation_config\.json"):
        stop_ids(tmp_path, 7)
