"""One token a character, with padding and end: the tokenizer of the tiny models.

It has no merges and no unknown token: a character outside the alphabet is a mistake in a
question, never something to train on. `save` writes the same mapping in Hugging Face's format.
This module imports no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

# What a question or its solution may contain. With the two special tokens that makes 32, the
# vocabulary size that `ModelConfig` starts from.
LABELS = "abcdefghijklmnopq"
ALPHABET = "0123456789+=," + LABELS

PAD_TOKEN = "<pad>"
EOS_TOKEN = "<eos>"


class CharTokenizer:
    """Characters to ids and back. There is no start token: a prompt is never empty.

    Attributes:
        pad_id: fills the right end of a batch; never sampled on purpose, never trained on.
        eos_id: ends a response.
        vocab_size: ids are 0 .. vocab_size - 1.
    """

    pad_id = 0
    eos_id = 1

    def __init__(self) -> None:
        self._tokens = [PAD_TOKEN, EOS_TOKEN, *ALPHABET]
        self._ids = {token: index for index, token in enumerate(self._tokens)}
        self.vocab_size = len(self._tokens)

    def encode(self, text: str) -> list[int]:
        """Ids of a text, one a character; no special token is added or recognised.

        Raises:
            ValueError: names every character outside the alphabet.
        """
        unknown = sorted(set(text) - set(ALPHABET))
        if unknown:
            raise ValueError(
                f"no token for {', '.join(map(repr, unknown))} in {text!r}: "
                f"expected only characters of {ALPHABET!r}"
            )
        return [self._ids[character] for character in text]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ids.

        Args:
            ids: ids of any length.
            skip_special: leave `<pad>` and `<eos>` out of the text.

        Raises:
            ValueError: names every id outside the vocabulary.
        """
        ids = list(ids)
        outside = sorted({index for index in ids if not 0 <= index < self.vocab_size})
        if outside:
            raise ValueError(f"no token has the ids {outside}: expected 0 .. {self.vocab_size - 1}")
        special = {self.pad_id, self.eos_id} if skip_special else set()
        return "".join(self._tokens[index] for index in ids if index not in special)

    def save(self, folder: Path) -> None:
        """Write `tokenizer.json` and `tokenizer_config.json`, which give the same ids.

        `transformers.PreTrainedTokenizerFast.from_pretrained(folder)` loads them. Unlike
        `encode`, a Hugging Face tokenizer reads the text `<eos>` as the special token.
        """
        folder.mkdir(parents=True, exist_ok=True)
        files = {"tokenizer.json": self._tokenizer_json(), "tokenizer_config.json": self._config()}
        for name, content in files.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    def _tokenizer_json(self) -> dict[str, object]:
        special = [
            {
                "id": index,
                "content": self._tokens[index],
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for index in (self.pad_id, self.eos_id)
        ]
        return {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": special,
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Split",
                "pattern": {"Regex": r"[\s\S]"},
                "behavior": "Isolated",
                "invert": False,
            },
            "post_processor": None,
            "decoder": {"type": "Fuse"},
            # The unknown token is not in the vocabulary, so that an unknown character is an error.
            "model": {"type": "WordLevel", "vocab": self._ids, "unk_token": "<unk>"},
        }

    def _config(self) -> dict[str, object]:
        return {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "pad_token": PAD_TOKEN,
            "eos_token": EOS_TOKEN,
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 1_000_000,
        }
