"""Turns prompts into tokens: a Hugging Face folder's chat template, and the limit on length.

This module imports no torch; transformers is imported when a tokenizer is opened.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_precision.config.errors import Problem, UserError
from megatron_precision.data.prompts import ChatPrompt, Message


class ChatEncoder(Protocol):
    """Turns messages into the tokens that a response follows."""

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Encode the whole chat, up to and including the opening of the assistant's turn.

        Raises:
            ValueError: when the template does not take these messages.
        """
        ...


class ChatTokenizer:
    """The tokenizer and chat template of a Hugging Face folder.

    Attributes:
        eos_id: ends a response.
        vocab_size: ids are 0 .. vocab_size - 1, added tokens included.
    """

    def __init__(self, folder: Path, *, template_options: Mapping[str, Any] | None = None) -> None:
        """
        Args:
            folder: holds the tokenizer's files; nothing is fetched and no code of it is run.
            template_options: variables that this template reads, `enable_thinking` for one.

        Raises:
            UserError: when the folder holds no tokenizer, or one without a chat template or an
                end token.
        """
        # It imports the whole of transformers, which takes seconds.
        from transformers import AutoTokenizer

        if not folder.is_dir():
            raise UserError(_folder_problem(folder, "no such folder"))
        try:
            self._hf = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(_folder_problem(folder, str(error).partition("\n")[0])) from error
        problems = []
        if not self._hf.chat_template:
            expected = "chat_template.jinja, or chat_template in tokenizer_config.json"
            problems.append(
                Problem("a tokenizer without a chat template", str(folder), "none", expected)
            )
        if self._hf.eos_token_id is None:
            expected = "eos_token in tokenizer_config.json"
            problems.append(
                Problem("a tokenizer without an end token", str(folder), "none", expected)
            )
        if problems:
            raise UserError(problems)
        self.eos_id: int = self._hf.eos_token_id
        self.vocab_size = len(self._hf)
        self._options = dict(template_options or {})

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        """Encode as `ChatEncoder` says; the template writes every special token."""
        from jinja2 import TemplateError

        turns = [{"role": message.role, "content": message.content} for message in messages]
        try:
            ids: list[int] = self._hf.apply_chat_template(
                turns, tokenize=True, add_generation_prompt=True, return_dict=False, **self._options
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses the messages: {error}") from error
        return ids

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Decode ids, with or without special tokens; spaces stay as they are."""
        text: str = self._hf.decode(
            list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
        )
        return text


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt and its tokens, as the engine takes it."""

    prompt: ChatPrompt
    tokens: tuple[int, ...]


@dataclass(frozen=True)
class EncodedPrompts:
    """The prompts that are short enough, and the number of longer ones.

    Attributes:
        kept: in the order of the input.
        num_too_long: prompts of more than the limit, dropped.
        longest_tokens: length of the longest prompt, dropped ones included.
    """

    kept: tuple[TokenPrompt, ...]
    num_too_long: int
    longest_tokens: int


def encode_prompts(
    prompts: Sequence[ChatPrompt], encoder: ChatEncoder, *, max_prompt_tokens: int
) -> EncodedPrompts:
    """Encode prompts and drop those of more than `max_prompt_tokens`.

    They are dropped, not cut: half a question has another answer.

    Raises:
        ValueError: for a limit below 1.
        UserError: lists every prompt that the template refuses; when no prompt is left.
    """
    if max_prompt_tokens < 1:
        raise ValueError(f"max_prompt_tokens: got {max_prompt_tokens}, expected 1 or more")
    kept: list[TokenPrompt] = []
    refused: list[Problem] = []
    longest = 0
    for number, prompt in enumerate(prompts, start=1):
        try:
            tokens = tuple(encoder.encode_chat(prompt.messages))
        except ValueError as error:
            where = f"prompt {number} of {len(prompts)}, {prompt.data_source or 'no data_source'}"
            roles = ", ".join(message.role for message in prompt.messages)
            what = "a prompt that the chat template refuses"
            refused.append(Problem(what, where, f"messages of {roles}: {error}", "others"))
            continue
        longest = max(longest, len(tokens))
        if len(tokens) <= max_prompt_tokens:
            kept.append(TokenPrompt(prompt, tokens))
    if refused:
        raise UserError(refused)
    if not kept:
        got = f"{len(prompts)} prompts, the longest of {longest} tokens"
        expected = f"at least one of {max_prompt_tokens} tokens or fewer"
        raise UserError(Problem("no prompt is short enough", "max_prompt_tokens", got, expected))
    return EncodedPrompts(tuple(kept), len(prompts) - len(kept), longest)


def _folder_problem(folder: Path, got: str) -> Problem:
    expected = "a Hugging Face folder with tokenizer.json and tokenizer_config.json"
    return Problem("a folder without a tokenizer", str(folder), got, expected)
