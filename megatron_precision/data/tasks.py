"""Builds a task: prompts with right answers, the tokens that end a response, and a grader.

    arithmetic_task   sums made up here, with the tiny models' own tokenizer
    chat_task         files of chat prompts, with a checkpoint's tokenizer and chat template

This module imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.schema import RunConfig, TaskConfig
from megatron_precision.data.arithmetic import CharTokenizer, Question, make_questions
from megatron_precision.data.chat import ChatTokenizer, encode_prompts
from megatron_precision.data.mixture import Mixture, MixtureSet, MixtureState
from megatron_precision.data.prompts import (
    ChatPrompt,
    PromptSet,
    parse_set,
    read_prompts,
    without_repeats,
)
from megatron_precision.rewards.grading import ArithmeticGrader, Grader, PooledGrader
from megatron_precision.rewards.scorers import scorer

# A start-up check runs the real model on so many sequences, of so many tokens at most.
_CHECK_SEQUENCES = 8
_CHECK_TOKENS = 256


@dataclass(frozen=True)
class TaskPrompt:
    """A prompt with its right answer.

    Attributes:
        id: names the question in any file and at any place.
        tokens: what the engine is given.
        answer: the right answer, as the grader expects it.
        text: the question for a reader.
    """

    id: str
    tokens: tuple[int, ...]
    answer: str
    text: str


@dataclass(frozen=True)
class TrainSet:
    """Prompts to train on, with their share of the mixture."""

    prompts: Sequence[TaskPrompt]
    weight: float = 1.0


@dataclass(frozen=True)
class Task:
    """A task: its prompts, its stop tokens, its text and its grader.

    Attributes:
        train: sets to train on, by name; the only set of a task may have none.
        evals: held-out sets, by name.
        stop_ids: each ends a response.
        decode: text of a response's tokens, without the one that ended it.
        open_grader: starts what grades; called on the ranks that grade.
        check_sequences: token ids of a few sequences, for the checks at start-up.
        counts: facts about the sets, for the record: prompts, repeats, dropped as too long.
    """

    train: Mapping[str, TrainSet]
    evals: Mapping[str, Sequence[TaskPrompt]]
    stop_ids: tuple[int, ...]
    decode: Callable[[Sequence[int]], str]
    open_grader: Callable[[], Grader]
    check_sequences: Sequence[Sequence[int]]
    counts: Mapping[str, Mapping[str, int]]

    def text(self, tokens: Sequence[int]) -> str:
        """Decode a response, without the token that ended it."""
        ended = bool(tokens) and tokens[-1] in self.stop_ids
        return self.decode(tokens[:-1] if ended else tokens)


class PromptOrder:
    """The order in which the prompts of a task's training sets come."""

    def __init__(self, task: Task, seed: int, stream: str = "order") -> None:
        """
        Args:
            stream: names an order of its own, for example of the prompts that fill up a batch.

        Raises:
            UserError: for a task without training prompts.
        """
        self._task = task
        sets = [MixtureSet(n, len(part.prompts), part.weight) for n, part in task.train.items()]
        self._mixture = Mixture(sets, seed, stream)

    def take(self, count: int) -> list[TaskPrompt]:
        """Take the next `count` prompts."""
        return [self._task.train[name].prompts[i] for name, i in self._mixture.take(count)]

    def state(self) -> MixtureState:
        """Return what `restore` needs."""
        return self._mixture.state()

    def restore(self, state: MixtureState) -> None:
        """Continue from a state that `state()` returned; see `Mixture.restore`."""
        self._mixture.restore(state)


# ---- arithmetic --------------------------------------------------------------------------


def arithmetic_prompts(questions: Iterable[Question]) -> list[TaskPrompt]:
    """Turn made-up sums into prompts."""
    tokenizer = CharTokenizer()
    return [
        TaskPrompt(q.id, tuple(tokenizer.encode(q.prompt)), q.answer, q.prompt) for q in questions
    ]


def arithmetic_task(config: TaskConfig, train: Sequence[Question], seed: int) -> Task:
    """Build the task of made-up sums.

    Args:
        train: the questions to train on; the held-out ones are drawn here.
    """
    tokenizer = CharTokenizer()
    held_out = make_questions(config, split="eval", count=config.eval_questions, seed=seed)
    prompts = arithmetic_prompts(train)
    return Task(
        train={"": TrainSet(prompts)},
        evals={"arithmetic": arithmetic_prompts(held_out)},
        stop_ids=(tokenizer.eos_id,),
        # A padding token in a response shows as one, and is no part of an answer.
        decode=lambda tokens: tokenizer.decode(tokens, skip_special=False),
        open_grader=ArithmeticGrader,
        check_sequences=[tokenizer.encode(q.prompt + q.solution) for q in train[:_CHECK_SEQUENCES]],
        counts={"arithmetic": {"train": len(prompts), "eval": len(held_out)}},
    )


# ---- chat --------------------------------------------------------------------------------


def chat_task(config: RunConfig) -> Task:
    """Build a task of chat prompts from files, with the checkpoint's chat template.

    A question that a file repeats is taken once.

    Raises:
        UserError: for files, a tokenizer or a scorer that cannot be used; see `read_prompts`,
            `ChatTokenizer`, `encode_prompts` and `scorers.scorer`.
    """
    task = config.task
    folder = Path(config.start.checkpoint)
    tokenizer = ChatTokenizer(folder)
    counts: dict[str, dict[str, int]] = {}

    def load(part: PromptSet) -> list[TaskPrompt]:
        read = read_prompts(part.path)
        once = without_repeats(read)
        encoded = encode_prompts(once, tokenizer, max_prompt_tokens=task.max_prompt_tokens)
        counts[part.name] = {
            "prompts": len(encoded.kept),
            "repeats": len(read) - len(once),
            "too_long": encoded.num_too_long,
            "longest_tokens": encoded.longest_tokens,
        }
        return [
            TaskPrompt(item.prompt.id, item.tokens, item.prompt.answer, _shown(item.prompt))
            for item in encoded.kept
        ]

    train = {
        part.name: TrainSet(load(part), part.weight) for part in map(parse_set, task.train_sets)
    }
    evals = {part.name: load(part) for part in map(parse_set, task.eval_sets)}
    score = scorer(task.scorer)
    first = [list(p.tokens) for part in train.values() for p in part.prompts[:_CHECK_SEQUENCES]]
    return Task(
        train=train,
        evals=evals,
        stop_ids=stop_ids(folder, tokenizer.eos_id),
        decode=tokenizer.decode,
        open_grader=lambda: PooledGrader(
            score, workers=task.scorer_workers, time_limit_s=task.scorer_time_limit_s
        ),
        # The end of a prompt is not like that of any other; its beginning is the template's.
        check_sequences=[tokens[-_CHECK_TOKENS:] for tokens in first[:_CHECK_SEQUENCES]],
        counts=counts,
    )


def stop_ids(folder: Path, eos_id: int) -> tuple[int, ...]:
    """Return the stop tokens: the tokenizer's end token, and `generation_config.json`'s.

    An instruct model may end a turn with another token than a text.

    Raises:
        UserError: for a file that says something else than ids.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return (eos_id,)
    try:
        found = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id", eos_id)
        ids = [found] if isinstance(found, int) else list(found or [eos_id])
        if not all(type(i) is int and i >= 0 for i in ids):
            raise TypeError(f"eos_token_id is {found!r}")
    except (ValueError, TypeError, AttributeError) as wrong:
        expected = "JSON with eos_token_id as an id or a list of ids"
        raise UserError(
            Problem("a generation config that cannot be read", str(path), str(wrong), expected)
        ) from wrong
    return tuple(dict.fromkeys([eos_id, *ids]))


def _shown(prompt: ChatPrompt) -> str:
    return "\n\n".join(message.content for message in prompt.messages)
