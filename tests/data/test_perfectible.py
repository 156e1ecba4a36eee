"""The perfectible set. Not covered: a machine that loses power during the write."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_precision.data.arithmetic import Question
from megatron_precision.data.perfectible import (
    PerfectibleQuestion,
    read_perfectible,
    select_perfectible,
    write_perfectible,
)

ONE = Question(id="sum-a1b2", prompt="a1b2=", answer="3", solution="b1+2=3")
TWO = Question(id="sum-a9b8", prompt="a9b8=", answer="17", solution="b8+9=17")
ITEMS = [PerfectibleQuestion(ONE, 0.2), PerfectibleQuestion(TWO, 0.525)]


def test_both_bounds_belong_to_the_set_for_every_count_of_forty() -> None:
    right = range(41)
    chosen = select_perfectible([count / 40 for count in right], 0.20, 0.80)
    # 20 % and 80 % of 40 responses are 8 and 32.
    assert chosen == list(range(8, 33))


def test_order_and_repeats_are_kept() -> None:
    assert select_perfectible([0.9, 0.5, 0.1, 0.5], 0.2, 0.8) == [1, 3]
    assert select_perfectible([], 0.2, 0.8) == []


def test_every_accuracy_that_is_no_share_is_listed() -> None:
    with pytest.raises(ValueError, match=r"1: nan, 2: 1\.5, 3: -0\.1"):
        select_perfectible([0.5, math.nan, 1.5, -0.1], 0.2, 0.8)


def test_bounds_the_wrong_way_round_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 0\.8 and 0\.2"):
        select_perfectible([0.5], 0.8, 0.2)


def test_a_written_set_reads_back_equal_and_leaves_no_other_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "perfectible.jsonl"
    write_perfectible(path, ITEMS)
    assert read_perfectible(path) == ITEMS
    assert [entry.name for entry in path.parent.iterdir()] == ["perfectible.jsonl"]


def test_a_line_is_a_question_with_its_accuracy(tmp_path: Path) -> None:
    path = tmp_path / "perfectible.jsonl"
    write_perfectible(path, ITEMS)
    assert [json.loads(line) for line in path.read_text().splitlines()][1] == {
        "id": "sum-a9b8", "prompt": "a9b8=", "answer": "17", "solution": "b8+9=17",
        "accuracy": 0.525,
    }  # fmt: skip


def test_a_write_that_fails_leaves_the_earlier_set_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "perfectible.jsonl"
    write_perfectible(path, ITEMS)
    unwritable = PerfectibleQuestion(ONE, object())  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        write_perfectible(path, [ITEMS[0], unwritable])
    assert read_perfectible(path) == ITEMS


def test_an_empty_set_is_a_file_without_lines(tmp_path: Path) -> None:
    path = tmp_path / "perfectible.jsonl"
    write_perfectible(path, [])
    assert path.read_text() == ""
    assert read_perfectible(path) == []


def test_every_bad_line_is_listed_with_its_number_and_its_fault(tmp_path: Path) -> None:
    path = tmp_path / "perfectible.jsonl"
    write_perfectible(path, ITEMS)
    good = json.loads(path.read_text().splitlines()[0])
    bad_lines = [
        "{",
        "[1]",
        json.dumps({**good, "colour": "red"}),
        json.dumps({**good, "answer": 3}),
        json.dumps({**good, "accuracy": 1.25}),
        json.dumps({**good, "accuracy": True}),
    ]
    path.write_text(path.read_text() + "\n".join(bad_lines) + "\n")
    with pytest.raises(ValueError, match="not a perfectible set") as caught:
        read_perfectible(path)
    message = str(caught.value)
    assert "line 3: not JSON" in message
    assert "line 4: expected an object with accuracy, answer, id, prompt, solution" in message
    assert "line 5: expected an object with" in message
    assert "line 6: expected text in answer" in message
    assert "line 7: expected an accuracy in 0 .. 1, got 1.25" in message
    assert "line 8: expected an accuracy in 0 .. 1, got True" in message
    assert "line 1:" not in message


def test_a_set_that_is_not_there_is_not_an_empty_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_perfectible(tmp_path / "none.jsonl")
