"""Prompt files: what is read, and that everything wrong with a file is said at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from megatron_precision.config.errors import UserError
from megatron_precision.data.prompts import Message, read_prompts, without_repeats


def row(content: str = "What is 2 + 3?", answer: Any = "5", **others: Any) -> dict[str, Any]:
    return {
        "data_source": "sums",
        "prompt": [{"role": "user", "content": content}],
        "reward_model": {"ground_truth": answer, "style": "rule"},
        **others,
    }


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(item) + "\n" for item in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def problems(path: Path) -> list[tuple[str, str]]:
    """What is wrong, and on which line or row."""
    with pytest.raises(UserError) as caught:
        read_prompts(path)
    return [(found.what, found.where.rpartition(" ")[2]) for found in caught.value.problems]


ROWS = [
    row(extra_info={"index": 1}),
    row("Name\u2028a\x0b letter: é", "é", data_source="letters"),
    {
        "data_source": "chats",
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "And 2 + 2?"},
        ],
        "reward_model": {"ground_truth": " 4 "},
    },
]


@pytest.mark.parametrize("write", [write_jsonl, write_parquet])
def test_both_kinds_of_file_give_the_same_typed_prompts(write: Any, tmp_path: Path) -> None:
    suffix = "jsonl" if write is write_jsonl else "parquet"
    prompts = read_prompts(write(tmp_path / f"set.{suffix}", ROWS))
    assert [p.answer for p in prompts] == ["5", "é", " 4 "]
    assert [p.data_source for p in prompts] == ["sums", "letters", "chats"]
    assert prompts[0].messages == (Message("user", "What is 2 + 3?"),)
    assert prompts[1].messages[0].content == "Name\u2028a\x0b letter: é"
    assert [m.role for m in prompts[2].messages] == ["system", "user", "assistant", "user"]
    other = write_jsonl(tmp_path / "again.jsonl", ROWS[::-1])
    assert [p.id for p in prompts] == [p.id for p in read_prompts(other)][::-1]


def test_raw_text_of_any_script_is_cut_at_line_feeds_alone(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    lines = [json.dumps(row(f"{n} a\u2028b\u0085c"), ensure_ascii=False) for n in range(2)]
    path.write_bytes("\r\n".join([*lines, "", ""]).encode())
    assert [p.messages[0].content for p in read_prompts(path)] == [
        "0 a\u2028b\u0085c",
        "1 a\u2028b\u0085c",
    ]


def test_a_whole_number_is_an_answer_and_the_source_may_be_missing(tmp_path: Path) -> None:
    bare = {key: value for key, value in row(answer=204).items() if key != "data_source"}
    for path in (
        write_jsonl(tmp_path / "set.jsonl", [bare]),
        write_parquet(tmp_path / "set.parquet", [bare]),
    ):
        (prompt,) = read_prompts(path)
        assert (prompt.answer, prompt.data_source) == ("204", "")


def test_repeats_are_kept_as_they_are_and_dropped_when_asked(tmp_path: Path) -> None:
    rows = [row("a"), row("b"), row("a"), row("a", "6"), row("b")]
    prompts = read_prompts(write_jsonl(tmp_path / "set.jsonl", rows))
    assert len(prompts) == 5
    assert len({p.id for p in prompts}) == 3
    assert [(p.messages[0].content, p.answer) for p in without_repeats(prompts)] == [
        ("a", "5"),
        ("b", "5"),
        ("a", "6"),
    ]


def test_every_problem_of_a_file_is_listed_with_its_line(tmp_path: Path) -> None:
    good = json.dumps(row())
    message = {"role": "user", "content": "?"}
    lines = [
        good,
        "{not json",
        "[1, 2]",
        json.dumps(row(prompt="a bare string")),
        json.dumps(row(prompt=[])),
        json.dumps(row(prompt=[{"role": "user"}, message])),
        json.dumps(row(prompt=[{"role": "tool", "content": "x"}])),
        json.dumps(row(prompt=[message, {"role": "assistant", "content": "5"}])),
        json.dumps(row(reward_model={"style": "rule"})),
        json.dumps(row(answer="  ")),
        json.dumps(row(answer=True)),
        json.dumps(row(answer=0.1)),
        json.dumps(row(data_source=["x"])),
        json.dumps(row("half a pair: \ud800")),
        good,
    ]
    path = tmp_path / "set.jsonl"
    path.write_bytes("\n".join(lines).encode() + b'\n{"prompt": "\xff"}\n' + b"[" * 200_000)
    unread = "a chat message that cannot be read"
    no_answer = "a row without a right answer"
    assert problems(path) == [
        ("a line that is not JSON", "2"),
        ("a row that is no object", "3"),
        ("a prompt that is no list of chat messages", "4"),
        ("a prompt that is no list of chat messages", "5"),
        (unread, "6"),
        (unread, "7"),
        ("a prompt that ends in no question", "8"),
        *((no_answer, str(line)) for line in (9, 10, 11, 12)),
        ("a data_source that is no text", "13"),
        (unread, "14"),
        ("a line that is not JSON", "16"),
        ("a line that is not JSON", "17"),
    ]


def test_of_many_problems_of_a_kind_ten_are_shown_and_the_rest_counted(tmp_path: Path) -> None:
    rows = [row(), *[row(answer="") for _ in range(13)]]
    with pytest.raises(UserError) as caught:
        read_prompts(write_jsonl(tmp_path / "set.jsonl", rows))
    message = str(caught.value)
    assert "13 problems" in message
    assert "set.jsonl, line 11\n" in message
    assert "set.jsonl, line 12" not in message
    assert "... and 3 more: a row without a right answer" in message


def test_parquet_rows_with_nulls_and_missing_columns_are_listed(tmp_path: Path) -> None:
    nulls = write_parquet(tmp_path / "nulls.parquet", [row(), row(prompt=None), row(answer=None)])
    assert problems(nulls) == [
        ("a prompt that is no list of chat messages", "2"),
        ("a row without a right answer", "3"),
    ]
    other = write_parquet(tmp_path / "other.parquet", [{"question": "?"}, {"question": "!"}])
    assert [where for _, where in problems(other)] == ["1", "1", "2", "2"]


def test_a_file_that_cannot_be_read_is_said_plainly(tmp_path: Path) -> None:
    assert problems(tmp_path / "missing.jsonl")[0][0] == "no such file of prompts"
    folder = tmp_path / "folder.parquet"
    folder.mkdir()
    assert problems(folder)[0][0] == "no such file of prompts"
    csv = tmp_path / "set.csv"
    csv.write_text("a,b\n", encoding="ascii")
    assert problems(csv)[0][0] == "a file of prompts of unknown kind"
    empty = tmp_path / "empty.jsonl"
    empty.write_bytes(b"\n")
    assert problems(empty)[0][0] == "a file without prompts"
    whole = write_parquet(tmp_path / "whole.parquet", [row()]).read_bytes()
    for name, content in (("text", b"no parquet at all"), ("cut", whole[: len(whole) // 2])):
        broken = tmp_path / f"{name}.parquet"
        broken.write_bytes(content)
        assert [what for what, _ in problems(broken)] == ["a parquet file that cannot be read"]
