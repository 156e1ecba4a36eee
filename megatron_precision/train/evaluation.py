"""Evaluates on held-out sets: avg@k and pass@k, and the answers for a person to read."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from megatron_precision.config.schema import EvalConfig
from megatron_precision.rewards.grading import Grade
from megatron_precision.train.session import Session


@dataclass
class Evaluation:
    """The result of an evaluation.

    Attributes:
        metrics: empty where there is nothing to evaluate on.
        answers: one record per response, in the order of sets, prompts and samples.
        failures: grades of responses that could not be scored.
    """

    metrics: dict[str, float] = field(default_factory=dict)
    answers: list[dict[str, Any]] = field(default_factory=list)
    failures: list[Grade] = field(default_factory=list)


def evaluate(session: Session, settings: EvalConfig, iteration: int) -> Evaluation:
    """Sample every held-out question `samples_per_question` times and grade the answers.

    Each set gets `eval/<set>_avg_at_<n>`, the mean accuracy over n samples per question, and
    `eval/<set>_pass_at_<k>` for every power of two up to n. `eval/accuracy` and
    `eval/pass_at_k` (k = n) are means over the sets, with equal weights.
    """
    found = Evaluation()
    accuracies: list[float] = []
    passes: list[float] = []
    lengths: list[int] = []
    samples = settings.samples_per_question
    for name, prompts in session.task.evals.items():
        if not prompts:
            continue
        sampled = session.rollouts.sample(
            prompts,
            rollouts_per_prompt=samples,
            purpose="eval" if len(session.task.evals) == 1 else f"eval, {name}",
            iteration=iteration,
            temperature=settings.temperature,
            logprobs=False,
            top_p=settings.top_p,
        )
        right = (sampled.rewards > 0).sum(1).tolist()
        accuracies.append(sum(right) / (samples * len(prompts)))
        passes.append(_mean(pass_at_k(samples, count, samples) for count in right))
        lengths += [len(rollout.tokens) for rollout in sampled.rollouts]
        found.metrics[f"eval/{name}_avg_at_{samples}"] = accuracies[-1]
        for k in powers_of_two(samples):
            found.metrics[f"eval/{name}_pass_at_{k}"] = _mean(
                pass_at_k(samples, count, k) for count in right
            )
        found.metrics[f"eval/{name}_truncated_share"] = _mean(
            float(rollout.truncated) for rollout in sampled.rollouts
        )
        found.failures += sampled.failures
        for rollout, reward in zip(sampled.rollouts, sampled.rewards.flatten(), strict=True):
            prompt = prompts[rollout.request.prompt]
            found.answers.append(
                {
                    "set": name,
                    "id": prompt.id,
                    "sample": rollout.request.rollout,
                    "question": prompt.text,
                    "answer": prompt.answer,
                    "response": session.task.text(rollout.tokens),
                    "reward": float(reward),
                    "tokens": len(rollout.tokens),
                    "truncated": rollout.truncated,
                }
            )
    if accuracies:
        found.metrics |= {
            "eval/accuracy": _mean(iter(accuracies)),
            "eval/pass_at_k": _mean(iter(passes)),
            "eval/tokens_mean": _mean(float(length) for length in lengths),
        }
    return found


def pass_at_k(samples: int, right: int, k: int) -> float:
    """Estimate the chance that at least one of k samples is right, drawn without replacement.

    1 - C(samples - right, k) / C(samples, k).

    Raises:
        ValueError: unless 0 <= right <= samples and 1 <= k <= samples.

    Source: arXiv 2107.03374, equation 1.
    """
    if not (0 <= right <= samples and 1 <= k <= samples):
        raise ValueError(f"pass@{k} of {right} right ones among {samples} samples")
    return 1.0 - math.comb(samples - right, k) / math.comb(samples, k)


def powers_of_two(largest: int) -> list[int]:
    """Return 1, 2, 4, ... up to `largest`."""
    return [1 << power for power in range(largest.bit_length())]


def write_answers(path: Path, found: Evaluation) -> None:
    """Write the answers as JSON Lines, completely or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as lines:
        lines.writelines(json.dumps(item, ensure_ascii=False) + "\n" for item in found.answers)
    partial.replace(path)


def _mean(values: Iterator[float]) -> float:
    return float(torch.tensor(list(values), dtype=torch.float64).mean())
