"""Hugging Face folders to convert, written by transformers and read by safetensors."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from megatron_precision.config.schema import ModelConfig
from tests.distributed.oracle import DENSE, MOE, random_hf_model

MODELS = {
    "qwen3": DENSE,
    "qwen3_moe": MOE,
    "qwen2": dataclasses.replace(DENSE, model_type="qwen2"),
    "llama": dataclasses.replace(
        DENSE,
        model_type="llama",
        tie_word_embeddings=True,
        rope_theta=500000.0,
        rope_scaling_factor=8.0,
    ),
}


def save(model: ModelConfig, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A checkpoint as transformers saves it, in several shards, with files beside it."""
    random_hf_model(model).to(dtype).save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer.json").write_text('{"a": 1}', encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """By the safetensors library, not by the converter."""
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def plant(hf: Path, name: str, values: list[float]) -> None:
    """Overwrite the first elements of a tensor."""
    for file in hf.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            flat = tensors[name].view(-1)
            flat[: len(values)] = torch.tensor(values, dtype=flat.dtype)
            save_file(tensors, file, {"format": "pt"})
