"""CharTokenizer. Not covered: the engine's own use of a saved tokenizer."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_precision.config.schema import TaskConfig
from megatron_precision.data.arithmetic import ALPHABET, CharTokenizer, make_questions


def test_ids_are_a_dense_range_with_padding_and_end_apart_from_the_characters() -> None:
    tokenizer = CharTokenizer()
    ids = tokenizer.encode(ALPHABET)
    assert sorted([tokenizer.pad_id, tokenizer.eos_id, *ids]) == list(range(tokenizer.vocab_size))


def test_decode_undoes_encode_and_leaves_special_tokens_out_unless_asked() -> None:
    tokenizer = CharTokenizer()
    ids = [*tokenizer.encode("b7+8=15"), tokenizer.eos_id, tokenizer.pad_id]
    assert len(ids) == 7 + 2
    assert tokenizer.decode(ids) == "b7+8=15"
    assert tokenizer.decode(ids, skip_special=False) == "b7+8=15<eos><pad>"


def test_every_unknown_character_is_named() -> None:
    with pytest.raises(ValueError, match="no token for ' ', 'Z', 'é'"):
        CharTokenizer().encode("a7 Z+é")


def test_ids_outside_the_vocabulary_are_named_and_negative_ones_do_not_wrap() -> None:
    with pytest.raises(ValueError, match=r"ids \[-1, 99\]: expected 0 \.\. 31"):
        CharTokenizer().decode([3, 99, -1])


def test_a_saved_tokenizer_gives_the_same_ids_in_transformers(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    ours = CharTokenizer()
    ours.save(tmp_path / "tokenizer")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path / "tokenizer")

    questions = make_questions(TaskConfig(difficulty=17), split="eval", count=20, seed=3)
    for text in [ALPHABET, "a", "", *(q.prompt + q.solution for q in questions)]:
        ids = ours.encode(text)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert (theirs.pad_token_id, theirs.eos_token_id) == (ours.pad_id, ours.eos_id)
    assert len(theirs) == ours.vocab_size
    ended = [*ours.encode("a1="), ours.eos_id, ours.pad_id]
    assert theirs.decode(ended, skip_special_tokens=True) == "a1="


def test_a_saved_tokenizer_loads_through_auto_tokenizer_too(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    CharTokenizer().save(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("a7b8=")["input_ids"] == CharTokenizer().encode("a7b8=")
