"""Make an MoE start out of a dense one: `python moe_start.py DENSE_START MOE_START`.

Every expert is a copy of the dense MLP and the router is random. Its weights over the chosen
experts add up to one, so that the MoE model computes the dense model's function: a start that is
right sometimes, without training one.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import torch

from megatron_precision.config.schema import ModelConfig
from megatron_precision.layouts.hf_files import read_checkpoint, write_checkpoint

EXPERTS = 8


def main() -> None:
    dense, moe = Path(sys.argv[1]), Path(sys.argv[2])
    facts = json.loads((dense / "start.json").read_text(encoding="utf-8"))
    model = dataclasses.replace(
        ModelConfig(**facts["made_from"]["model"]),
        model_type="qwen3_moe",
        num_experts=EXPERTS,
        num_experts_per_tok=2,
        moe_intermediate_size=facts["made_from"]["model"]["intermediate_size"],
    )
    generator = torch.Generator().manual_seed(7)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in read_checkpoint(dense / "model").items():
        before, mlp, after = name.partition(".mlp.")
        if not mlp:
            tensors[name] = tensor
            continue
        for expert in range(EXPERTS):
            tensors[f"{before}.mlp.experts.{expert}.{after}"] = tensor.clone()
        gate = 0.1 * torch.randn(EXPERTS, model.hidden_size, generator=generator)
        # On a coarse grid, which every precision holds exactly.
        tensors[f"{before}.mlp.gate.weight"] = (gate * 256).round() / 256
    write_checkpoint(moe / "model", model, tensors)
    shutil.copy(dense / "questions.jsonl", moe)
    (moe / "start.json").write_text(json.dumps({"accuracy": facts["accuracy"]}), encoding="utf-8")


if __name__ == "__main__":
    main()
