"""Hugging Face models and checkpoints from the project's tensors: export, and an oracle.

transformers keeps experts stacked in memory and separate on disk; checkpoints here use the names
on disk, as vLLM and every other reader does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_precision.config.errors import UserError
from megatron_precision.config.schema import ModelConfig
from megatron_precision.layouts.hf_config import INDEX, SINGLE, hf_config, weights_missing


def build_hf_model(model: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """Build a transformers model in FP32 with these weights, in evaluation mode.

    Args:
        tensors: by their names on disk, any float dtype.
    """
    import transformers

    fields = hf_config(model, "float32")
    fields.pop("architectures")
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    config._attn_implementation = "eager"
    reference = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    state = stack_experts({name: tensor.float() for name, tensor in tensors.items()}, model)
    missing, unexpected = reference.load_state_dict(state, strict=False)
    missing = [n for n in missing if not (n == "lm_head.weight" and model.tie_word_embeddings)]
    if missing or unexpected:
        raise ValueError(f"not this model's tensors: missing {missing}, unexpected {unexpected}")
    return reference.eval()


def stack_experts(
    tensors: Mapping[str, torch.Tensor], model: ModelConfig
) -> dict[str, torch.Tensor]:
    """Map names on disk to transformers' in memory (`experts.gate_up_proj` [E, 2I, H])."""
    state = {name: t for name, t in tensors.items() if ".mlp.experts." not in name}
    for layer in range(model.num_hidden_layers if model.num_experts else 0):
        prefix = f"model.layers.{layer}.mlp.experts"
        experts = range(model.num_experts)
        state[f"{prefix}.gate_up_proj"] = torch.stack(
            [
                torch.cat(
                    [
                        tensors[f"{prefix}.{e}.gate_proj.weight"],
                        tensors[f"{prefix}.{e}.up_proj.weight"],
                    ]
                )
                for e in experts
            ]
        )
        state[f"{prefix}.down_proj"] = torch.stack(
            [tensors[f"{prefix}.{e}.down_proj.weight"] for e in experts]
        )
    return state


def write_checkpoint(folder: Path, model: ModelConfig, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write `config.json` and `model.safetensors`; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    (dtype,) = {tensor.dtype for tensor in tensors.values()}
    config = hf_config(model, str(dtype).removeprefix("torch."))
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file({name: t.contiguous() for name, t in tensors.items()}, folder / "model.safetensors")


def read_checkpoint(folder: Path) -> dict[str, torch.Tensor]:
    """Read the tensors that `write_checkpoint` wrote."""
    return load_file(folder / "model.safetensors")


class OpenCheckpoint(Mapping[str, Any]):
    """The tensors of a folder by name; indexing one by a box reads that box alone.

    A rank reads its own shard of a model that no rank could hold.
    """

    def __init__(self, folder: Path) -> None:
        """
        Args:
            folder: holds `model.safetensors`, or `model.safetensors.index.json` and its shards.

        Raises:
            UserError: when it holds neither, or not every shard.
        """
        self._files = _tensor_files(folder)
        self._open: dict[Path, Any] = {
            path: safe_open(path, framework="pt") for path in sorted({*self._files.values()})
        }

    def __getitem__(self, name: str) -> Any:
        return self._open[self._files[name]].get_slice(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def _tensor_files(folder: Path) -> dict[str, Path]:
    """Map each tensor's name to its file."""
    missing = weights_missing(folder)
    if missing:
        raise UserError(missing)
    single, index = folder / SINGLE, folder / INDEX
    if index.is_file():
        found: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {name: folder / file for name, file in found.items()}
    else:
        with safe_open(single, framework="pt") as tensors:
            files = dict.fromkeys(tensors.keys(), single)
    return files
