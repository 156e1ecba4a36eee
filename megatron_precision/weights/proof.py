"""The start-up proof: a push that goes nowhere, or to a place no kernel reads, is caught.

Perturbed weights are pushed, and the engine's log-probs of fixed tokens must be those of an
independent forward pass (Hugging Face, FP32) of the perturbed weights. Then the true weights are
pushed back, and log-probs must be, bit for bit, what they were before. Unchanged weights alone
would prove nothing. Each push is also read back through the kernels (`verify.py`), which names
the layers that differ.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_precision.config import ModelConfig
from megatron_precision.precision.policy import DType
from megatron_precision.rollout.vllm_engine import VllmEngine
from megatron_precision.weights.sync import WeightSync, WeightSyncError

# The mean absolute log-prob difference between two correct implementations, less the largest
# tenth, stays well below these (seen on tiny models: 2e-7, 2e-4, 1.5e-3); other weights are off by
# about one. The largest tenth is left out because rounding sends single tokens of an MoE model to
# other experts, which is no fault of the sync.
TOLERANCE: dict[DType, float] = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2}
PERTURBATION = 0.2

Forward = Callable[[Mapping[str, torch.Tensor], Sequence[Sequence[int]]], list[list[float]]]


@dataclass(frozen=True)
class ProofResult:
    """What the proof measured.

    Attributes:
        moved: mean absolute log-prob change that the perturbation made.
        error: mean absolute difference between the engine and the independent forward, less the
            largest tenth.
    """

    moved: float
    error: float


def prove_sync(
    sync: WeightSync,
    engine: VllmEngine,
    rollout_dtype: DType,
    prompts: Sequence[Sequence[int]],
    forward: Forward,
) -> ProofResult:
    """Run the proof; the engine must hold the trainer's weights when it is called.

    Args:
        prompts: token sequences to score, two tokens or more each.
        forward: an independent implementation: (Hugging Face tensors, prompts) to log-probs.

    Raises:
        WeightSyncError: where any part of the proof fails.
    """
    before = engine.score(prompts)
    true = {name: tensor.clone() for name, tensor in sync.gathering.gather().items()}
    perturbed = perturb(true)
    sync.push_tensors(perturbed, engine.weight_version)
    moved_to = engine.score(prompts)
    expected = forward(perturbed, prompts)
    result = ProofResult(
        float(_differences(moved_to, before).mean()),
        _trimmed_mean(_differences(moved_to, expected)),
    )
    sync.push_tensors(true, engine.weight_version)
    after = engine.score(prompts)

    problems = []
    tolerance = TOLERANCE[rollout_dtype]
    if not result.error <= tolerance:
        problems.append(
            f"after perturbed weights were pushed, the engine's log-probs are off those of an "
            f"independent forward by {result.error:.2e} on average (allowed: {tolerance:.0e})"
        )
    if not result.moved > 4 * tolerance:
        problems.append(
            f"pushing perturbed weights moved the engine's log-probs by {result.moved:.2e} only"
        )
    if after != before:
        problems.append(
            "after the true weights were pushed back, the engine's log-probs are not what they "
            f"were (mean difference {float(_differences(after, before).mean()):.2e})"
        )
    if problems:
        raise WeightSyncError(
            "the start-up proof of the weight sync failed:\n  " + "\n  ".join(problems)
        )
    dist.barrier()
    return result


def perturb(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every element times 1 + 0.2 ξ, ξ normal and seeded by the tensor's name; dtype kept."""
    perturbed = {}
    for name, tensor in tensors.items():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        noise = torch.randn(tensor.shape, generator=generator)
        perturbed[name] = (tensor.float() * (1 + PERTURBATION * noise)).to(tensor.dtype)
    return perturbed


def hf_forward(model: ModelConfig) -> Forward:
    """Log-probs by Hugging Face transformers in FP32: the independent implementation."""

    def forward(
        tensors: Mapping[str, torch.Tensor], prompts: Sequence[Sequence[int]]
    ) -> list[list[float]]:
        from megatron_precision.weights.hf_model import build_hf_model

        reference = build_hf_model(model, tensors)
        scored = []
        with torch.inference_mode():
            for tokens in prompts:
                ids = torch.tensor([list(tokens)])
                logprobs = reference(ids).logits[0].float().log_softmax(-1)
                picked = logprobs[:-1].gather(-1, ids[0, 1:, None]).squeeze(-1)
                scored.append(picked.tolist())
        return scored

    return forward


def _differences(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> torch.Tensor:
    """Absolute differences of all scored tokens, FP64."""
    first = torch.tensor([x for row in a for x in row], dtype=torch.float64)
    second = torch.tensor([x for row in b for x in row], dtype=torch.float64)
    return (first - second).abs()


def _trimmed_mean(differences: torch.Tensor) -> float:
    """Mean of all but the largest tenth; nan where any difference is not a number."""
    if differences.isnan().any():
        return float("nan")
    kept = differences.sort().values[: max(1, math.ceil(0.9 * len(differences)))]
    return float(kept.mean())
