"""A tiny checkpoint with random weights, a chat template and files of prompts, as a user has them.

    python chat_start.py FOLDER [RECIPE]

writes FOLDER/model, of the architecture of RECIPE (sanity.tiny_dense), and beside it
FOLDER/{sums,others,held_out}.jsonl.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch
import transformers

import recipes
from megatron_precision.config.schema import ModelConfig
from megatron_precision.data.arithmetic import CharTokenizer
from megatron_precision.layouts.hf_config import hf_config

# Prompts in the alphabet of the tiny tokenizer; the answers are what `chat_scorers` reads.
SUMS = [(f"a{n}b{n + 1}", "even" if n % 2 else "odd") for n in range(12)]
OTHERS = [("abc", "raise"), ("cba", "hang"), ("aabbcc", "even")]
HELD_OUT = [(f"q{n}", "odd") for n in range(3)]
TOO_LONG = ("abcdefgh" * 8, "even")
TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}={% endif %}"
)


def write_model(folder: Path, model: ModelConfig, vocab_size: int | None = None) -> None:
    """A model of random weights in BF16, in several shards, with tokenizer and chat template."""
    model = dataclasses.replace(model, vocab_size=vocab_size or model.vocab_size)
    fields = hf_config(model, "bfloat16")
    fields.pop("architectures")
    fields |= {"eos_token_id": CharTokenizer.eos_id, "pad_token_id": CharTokenizer.pad_id}
    fields["initializer_range"] = model.initializer_range
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.manual_seed(1)
    built = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    built.save_pretrained(folder, max_shard_size="300KB")
    CharTokenizer().save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def write_prompts(path: Path, questions: list[tuple[str, str]]) -> None:
    """Prompts in the layout of the field."""
    with path.open("w", encoding="utf-8") as lines:
        for content, answer in questions:
            row = {
                "data_source": path.stem,
                "prompt": [{"role": "user", "content": content}],
                "reward_model": {"ground_truth": answer, "style": "rule"},
            }
            lines.write(json.dumps(row) + "\n")


def main() -> None:
    folder = Path(sys.argv[1])
    recipe = sys.argv[2] if len(sys.argv) > 2 else "sanity.tiny_dense"
    write_model(folder / "model", recipes.build(recipe).model)
    write_prompts(folder / "sums.jsonl", [*SUMS, SUMS[0], TOO_LONG])
    write_prompts(folder / "others.jsonl", OTHERS)
    write_prompts(folder / "held_out.jsonl", HELD_OUT)


if __name__ == "__main__":
    main()
