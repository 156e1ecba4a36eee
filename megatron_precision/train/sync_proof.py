"""Proves at start-up that a push reaches the weights that the engine's kernels read.

The trainer's weights are perturbed and pushed. The engine's log-probs of fixed tokens must then
equal the trainer's, which come from another implementation, within rounding. After the true
weights are pushed back, the engine's log-probs must be bit for bit what they were. A push of
unchanged weights would prove nothing: it looks right even if it writes nowhere. Each push is also
read back through the kernels (`sync/verify.py`), which names the regions that differ.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from megatron_precision.actor.actor import Actor
from megatron_precision.actor.batch import make_batch
from megatron_precision.layouts.regions import Region
from megatron_precision.precision.policy import DType
from megatron_precision.rollout.vllm_engine import VllmEngine
from megatron_precision.train.weight_sync import WeightSync, WeightSyncError

# On tiny models the mean absolute log-prob difference between two correct implementations is well
# below these (measured: 4e-7, 4e-4, 3e-3). The largest tenth is left out of the mean, because
# rounding sends single tokens of an MoE model to other experts, which is no fault of the sync.
TOLERANCE: dict[DType, float] = {"fp32": 1e-4, "fp16": 5e-3, "bf16": 4e-2}
# Deep models round more (SmolLM2-135M: 0.044 in BF16, 0.0077 in FP16), but the perturbation also
# moves them more (0.96). The engine must be this many times closer to the pushed weights than to
# its old ones.
CLOSER = 8
# Larger noise makes a deep model chaotic: with 0.2, the two sides differ by 0.49 on SmolLM2, BF16.
PERTURBATION = 0.05


@dataclass(frozen=True)
class ProofResult:
    """The measurements of the proof.

    Attributes:
        moved: mean absolute change of the engine's log-probs by the perturbation.
        error: mean absolute difference between engine and trainer, without the largest tenth.
    """

    moved: float
    error: float


def prove_sync(
    sync: WeightSync, engine: VllmEngine, actor: Actor, prompts: Sequence[Sequence[int]]
) -> ProofResult:
    """Run the proof; before it, the engine must have the trainer's weights.

    Args:
        prompts: token sequences to score, of at least two tokens each; their number is a multiple
            of the data-parallel size.

    Raises:
        WeightSyncError: where any part of the proof fails.
    """
    before = engine.score(prompts)
    with actor.weights.changed(perturbed):
        sync.push(engine.weight_version)
        moved_to = engine.score(prompts)
        expected = _trainer_scores(actor, prompts)
    sync.push(engine.weight_version)
    after = engine.score(prompts)
    result = ProofResult(
        float(_differences(moved_to, before).mean()),
        _trimmed_mean(_differences(moved_to, expected)),
    )

    problems = []
    policy = actor.policy
    tolerance = max(TOLERANCE[policy.params], TOLERANCE[policy.rollout_params])
    allowed = max(tolerance, result.moved / CLOSER)
    if not result.error <= allowed:
        problems.append(
            f"after perturbed weights were pushed, the engine's log-probs are off the trainer's "
            f"by {result.error:.2e} on average (allowed: {allowed:.0e})"
        )
    if not result.moved > 4 * result.error:
        problems.append(
            f"pushing perturbed weights moved the engine's log-probs by {result.moved:.2e} only, "
            f"and left them {result.error:.2e} off the trainer's"
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


def perturbed(region: Region, values: torch.Tensor) -> torch.Tensor:
    """Multiply every element by 1 + 0.05 ξ, ξ normal; replicas of a region get the same noise."""
    seed = zlib.crc32(f"{region.hf_name} {region.start}".encode())
    noise = torch.randn(values.shape, generator=torch.Generator().manual_seed(seed))
    return (values.float() * (1 + PERTURBATION * noise.to(values.device))).to(values.dtype)


def _trainer_scores(actor: Actor, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
    """Score each prompt's tokens after the first with the trainer, at temperature 1."""
    heads, tails = [p[:1] for p in prompts], [p[1:] for p in prompts]
    zeros = [[0.0] * len(tail) for tail in tails]
    batch = make_batch(heads, tails, zeros, torch.ones(len(prompts)))
    logprobs = actor.logprobs(batch, [torch.arange(len(batch))], temperature=1.0)
    return [row[mask].tolist() for row, mask in zip(logprobs, batch.response_mask, strict=True)]


def _differences(a: Sequence[Sequence[float]], b: Sequence[Sequence[float]]) -> torch.Tensor:
    """Return the absolute differences of all scored tokens, FP64."""
    first = torch.tensor([x for row in a for x in row], dtype=torch.float64)
    second = torch.tensor([x for row in b for x in row], dtype=torch.float64)
    return (first - second).abs()


def _trimmed_mean(differences: torch.Tensor) -> float:
    """Return the mean without the largest tenth; nan if any difference is nan."""
    if differences.isnan().any():
        return float("nan")
    kept = differences.sort().values[: max(1, math.ceil(0.9 * len(differences)))]
    return float(kept.mean())
