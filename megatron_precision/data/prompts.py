"""Reads prompts with right answers from parquet or JSON Lines, in the field's usual layout.

    data_source    names the set; optional
    prompt         [{"role": "user", "content": "..."}, ...]
    reward_model   {"ground_truth": "204", ...}

Other columns are ignored. A file is read completely or not at all: every unusable row is reported,
none is skipped. A configuration names a set as `NAME=PATH` or `NAME=PATH@WEIGHT`; `parse_set` reads
that without opening the file. This module imports no torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_precision.config.errors import Problem, UserError

_COLUMNS = ("data_source", "prompt", "reward_model")
_ROLES = ("system", "user", "assistant")
_ROWS_AT_ONCE = 1024
# A problem shows so much of what was found, in characters.
_SHOWN = 80


@dataclass(frozen=True)
class Message:
    """One turn of a chat."""

    role: str
    content: str


@dataclass(frozen=True)
class ChatPrompt:
    """A question as chat messages, with its right answer.

    Attributes:
        id: a digest of messages and answer: it names the same question in any file and at any
            place; safe in a file name.
        messages: at least one; the last is the user's.
        answer: the right answer, as the set's scorer expects it.
        data_source: the set that the row says it is from; may be empty.
    """

    id: str
    messages: tuple[Message, ...]
    answer: str
    data_source: str


def read_prompts(path: Path) -> list[ChatPrompt]:
    """Read every prompt of a `.parquet` or `.jsonl` file, in the file's order.

    A question that a file repeats comes as often as it is there; see `without_repeats`.

    Raises:
        UserError: when the file is missing, of another kind or empty; lists every row that is
            no prompt.
    """
    rows = _rows(path)
    prompts: list[ChatPrompt] = []
    problems: list[Problem] = []
    for where, row in rows:
        if isinstance(row, Problem):
            problems.append(row)
            continue
        wrong = list(_row_problems(where, row))
        problems.extend(wrong)
        if not wrong:
            prompts.append(_prompt(row))
    if problems:
        raise UserError(problems)
    if not prompts:
        raise UserError(Problem("a file without prompts", str(path), "no rows", "at least one"))
    return prompts


def without_repeats(prompts: Iterable[ChatPrompt]) -> list[ChatPrompt]:
    """Return the prompts in order, each question once: some published sets repeat theirs."""
    return list({prompt.id: prompt for prompt in prompts}.values())


def _rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield each row's place and its decoded value, or a problem."""
    readers = {".parquet": _parquet_rows, ".jsonl": _jsonl_rows}
    expected = " or ".join(f"a {suffix} file" for suffix in readers)
    if not path.is_file():
        raise UserError(Problem("no such file of prompts", str(path), "nothing there", expected))
    if path.suffix not in readers:
        got = path.suffix or "no extension"
        raise UserError(Problem("a file of prompts of unknown kind", str(path), got, expected))
    return readers[path.suffix](path)


def _parquet_rows(path: Path) -> Iterator[tuple[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
            number = 0
            for batch in file.iter_batches(batch_size=_ROWS_AT_ONCE, columns=columns):
                # With none of the columns a batch has rows and nothing in them.
                for row in batch.to_pylist() if columns else [{}] * batch.num_rows:
                    number += 1
                    yield f"{path}, row {number}", row
    except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
        problem = Problem("a parquet file that cannot be read", str(path), str(error), "parquet")
        yield str(path), problem


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open("rb") as lines:
        # Bytes are cut at line feeds alone; text would also be cut at marks inside a string.
        for number, line in enumerate(lines, start=1):
            where = f"{path}, line {number}"
            if not line.strip():
                continue
            try:
                yield where, json.loads(line)
            except (ValueError, RecursionError) as error:
                got = f"{_short(line.decode(errors='replace'))} ({error})"
                yield where, Problem("a line that is not JSON", where, got, "one object a line")


def _row_problems(where: str, row: Any) -> Iterator[Problem]:
    if not isinstance(row, dict):
        yield Problem("a row that is no object", where, _short(row), "an object")
        return
    yield from _prompt_problems(where, row.get("prompt"))
    source = row.get("data_source")
    if source is not None and not _is_text(source):
        yield Problem("a data_source that is no text", where, _short(source), "text, or nothing")
    rule = row.get("reward_model")
    answer = rule.get("ground_truth") if isinstance(rule, dict) else None
    whole = isinstance(answer, int) and not isinstance(answer, bool)
    if not whole and not (_is_text(answer) and str(answer).strip()):
        got = _short(rule if answer is None else answer)
        expected = "reward_model.ground_truth as text or a whole number"
        yield Problem("a row without a right answer", where, got, expected)


def _prompt_problems(where: str, messages: Any) -> Iterator[Problem]:
    if not isinstance(messages, list) or not messages:
        what = "a prompt that is no list of chat messages"
        expected = 'prompt as [{"role": "user", "content": "..."}]'
        yield Problem(what, where, _short(messages), expected)
        return
    roles: list[Any] = []
    for message in messages:
        fields = message if isinstance(message, dict) else {}
        roles.append(fields.get("role"))
        if roles[-1] not in _ROLES or not _is_text(fields.get("content")):
            what = "a chat message that cannot be read"
            expected = f"role as one of {', '.join(_ROLES)}; content as text"
            yield Problem(what, where, _short(message), expected)
    if roles[-1] in ("system", "assistant"):
        what = "a prompt that ends in no question"
        yield Problem(what, where, f"a last message of {roles[-1]}", "one of user")


def _is_text(value: Any) -> bool:
    """Say whether a value is text that can be encoded: JSON allows half a surrogate pair."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _prompt(row: dict[str, Any]) -> ChatPrompt:
    messages = tuple(Message(m["role"], m["content"]) for m in row["prompt"])
    answer = str(row["reward_model"]["ground_truth"])
    identity = json.dumps([[[m.role, m.content] for m in messages], answer])
    digest = hashlib.sha256(identity.encode()).hexdigest()[:16]
    return ChatPrompt(digest, messages, answer, row.get("data_source") or "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


EXPECTED = "NAME=PATH or NAME=PATH@WEIGHT, the name of letters, digits, - and _, the weight above 0"
_NAME = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True)
class PromptSet:
    """One file of prompts.

    Attributes:
        name: in metrics and in the order of prompts.
        path: a `.parquet` or `.jsonl` file; see `data/prompts.py`.
        weight: its share of a mixture, relative to the other weights.
    """

    name: str
    path: Path
    weight: float = 1.0


def parse_set(text: str) -> PromptSet:
    """Parse `NAME=PATH` or `NAME=PATH@WEIGHT`.

    Raises:
        ValueError: its message says what would have been accepted.
    """
    name, equals, rest = text.partition("=")
    path, at, weight = rest.rpartition("@")
    if not at:
        path, weight = rest, "1"
    try:
        number = float(weight)
    except ValueError:
        path, number = rest, 1.0  # an @ of the path's own
    if not (equals and _NAME.fullmatch(name) and path and 0 < number < math.inf):
        raise ValueError(EXPECTED)
    return PromptSet(name, Path(path), number)


def set_problems(field: str, texts: Sequence[str]) -> Iterator[Problem]:
    """List what is wrong with the sets of one setting."""
    names: Counter[str] = Counter()
    for text in texts:
        try:
            names[parse_set(text).name] += 1
        except ValueError as wrong:
            yield Problem("a set of prompts that cannot be read", field, repr(text), str(wrong))
    for name, times in names.items():
        if times > 1:
            yield Problem(
                "two sets of one name", field, f"{name}, {times} times", "a name for each set"
            )
