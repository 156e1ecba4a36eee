"""The independent side of the engine tests: transformers in FP32 with autograd, on random weights.

Tensors go by their names on disk; transformers keeps experts stacked in memory, so they are
split here by this file's own rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import transformers

from megatron_precision.actor.batch import Batch, make_batch
from megatron_precision.config.schema import ModelConfig
from megatron_precision.layouts.hf_config import hf_config

# No two sizes are equal, and the vocabulary is odd, so that a transposed or padded one shows.
DENSE = ModelConfig(
    vocab_size=37,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    rope_theta=700.0,
)
MOE = ModelConfig(
    model_type="qwen3_moe",
    vocab_size=37,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=2,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=8,
    rope_theta=700.0,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
)


def random_hf_model(model: ModelConfig, scale: float = 0.3) -> torch.nn.Module:
    """transformers' model in FP32; norms around 1, matrices normal with deviation `scale`."""
    fields = hf_config(model, "float32")
    fields.pop("architectures")
    config = transformers.AutoConfig.for_model(fields.pop("model_type"), **fields)
    config._attn_implementation = "eager"
    built = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in built.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise * scale if parameter.ndim > 1 else 1 + 0.2 * noise)
    return built.eval()


def on_disk(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names and shapes of a checkpoint: `gate_up_proj [E, 2I, H]` becomes 2E matrices."""
    tensors = {}
    for name, tensor in state.items():
        if name.endswith("mlp.experts.gate_up_proj"):
            prefix = name.removesuffix("gate_up_proj")
            for expert, stacked in enumerate(tensor):
                gate, up = stacked.chunk(2)
                tensors[f"{prefix}{expert}.gate_proj.weight"] = gate.clone()
                tensors[f"{prefix}{expert}.up_proj.weight"] = up.clone()
        elif name.endswith("mlp.experts.down_proj"):
            prefix = name.removesuffix("down_proj")
            for expert, matrix in enumerate(tensor):
                tensors[f"{prefix}{expert}.down_proj.weight"] = matrix.clone()
        else:
            tensors[name] = tensor.detach().clone()
    return tensors


def checkpoint(model: ModelConfig, built: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The model's tensors by their names on disk."""
    tensors = on_disk(built.state_dict())
    if model.tie_word_embeddings:
        tensors.pop("lm_head.weight", None)
    return tensors


def random_batch(model: ModelConfig, sequences: int, seed: int = 1) -> Batch:
    """Prompts and responses of many lengths; `rollout_logprobs` holds random weights."""
    generator = torch.Generator().manual_seed(seed)

    def tokens(count: int) -> list[int]:
        return torch.randint(0, model.vocab_size, (count,), generator=generator).tolist()

    prompts = [tokens(3 + row % 3) for row in range(sequences)]
    responses = [tokens(5 + 2 * row % 7) for row in range(sequences)]
    weights = [torch.randn(len(r), generator=generator).tolist() for r in responses]
    return make_batch(prompts, responses, weights, torch.randn(sequences, generator=generator))


def logprobs_of(
    built: torch.nn.Module, rows: Sequence[Sequence[int]], temperature: float = 1.0
) -> list[torch.Tensor]:
    """For each sequence, [length - 1] log-probs of its tokens after the first."""
    scored = []
    for row in rows:
        ids = torch.tensor([list(row)])
        logits = built(ids).logits[0].float() / temperature
        scored.append(logits.log_softmax(-1)[:-1].gather(-1, ids[0, 1:, None]).squeeze(-1))
    return scored


@dataclass
class Expected:
    """What the trainer must reproduce.

    Attributes:
        logprobs: [S, L] FP32, zero outside the response.
        loss: sum of weight times log-prob.
        gradients: of that loss, by names on disk.
        grad_norm: L2 norm over all gradients.
    """

    logprobs: torch.Tensor
    loss: float
    gradients: dict[str, torch.Tensor]
    grad_norm: float


def expected(
    model: ModelConfig, built: torch.nn.Module, batch: Batch, temperature: float = 1.0
) -> Expected:
    """Forward one unpadded sequence at a time, and autograd."""
    built.zero_grad()
    rows = [
        tokens[:length].tolist()
        for tokens, length in zip(batch.tokens, batch.lengths.tolist(), strict=True)
    ]
    width = batch.tokens.shape[1]
    padded = [
        torch.cat([torch.zeros(1), row, torch.zeros(width - 1 - len(row))])
        for row in logprobs_of(built, rows, temperature)
    ]
    logprobs = torch.stack(padded) * batch.response_mask
    loss = (logprobs * batch.rollout_logprobs).sum()
    loss.backward()
    stacked = {name: parameter.grad for name, parameter in built.named_parameters()}
    norm = torch.stack([grad.double().pow(2).sum() for grad in stacked.values()]).sum().sqrt()
    return Expected(logprobs.detach(), float(loss.detach()), on_disk(stacked), float(norm))
