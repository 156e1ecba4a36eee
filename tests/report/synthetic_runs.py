"""Synthetic runs: metrics files with invented numbers, for the tests of observe/ only.

The numbers are drawn at random around round figures. They come from no engine and show nothing
about FP16 or BF16.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from megatron_precision.config.schema import RunConfig, to_dict
from megatron_precision.observe.metrics import MetricsWriter

STEPS_PER_ITERATION = 4
ROUNDING = {"bf16": 8e-3, "fp16": 1e-3, "fp32": 1e-7}  # invented per-token differences, nats

Step = dict[str, Any]


def write_synthetic_run(
    run_dir: Path,
    precision: str = "fp16",
    *,
    iterations: int = 40,
    with_evals: bool = True,
    status: str | None = "completed",
    error: str = "",
    config_changes: dict[str, Any] | None = None,
    reward_bonus: float = 0.0,
    skipped_steps: tuple[int, ...] = (),
) -> Path:
    """Write run_dir/metrics.jsonl as the loop does, by docs/architecture.md; return run_dir.

    `step` counts attempted steps, so the first step's event is step 1; an evaluation's
    `iteration` is the number of iterations before it.

    `status=None` leaves the `end` event out, as a killed run does. `config_changes` are
    top-level fields of the config dict.
    """
    random = np.random.default_rng(7)
    step = 0
    config = to_dict(RunConfig(recipe="sanity.synthetic", precision=precision))
    config["train"]["iterations"] = 40
    config.update(config_changes or {})
    with MetricsWriter(run_dir / "metrics.jsonl") as writer:
        writer.write("run", iteration=0, step=0, values=_header(config))
        if with_evals:
            writer.write("eval", iteration=0, step=0, values=_evaluation(random, 0))
        for iteration in range(iterations):
            for _ in range(STEPS_PER_ITERATION):
                step += 1
                values = _step(random, precision, step, skipped_steps)
                writer.write("step", iteration=iteration, step=step, values=values)
            skipped = sum(at <= step for at in skipped_steps)
            values = _iteration(random, precision, iteration, reward_bonus, skipped)
            writer.write("iteration", iteration=iteration, step=step, values=values)
            done = iteration + 1
            if with_evals and done % 5 == 0:
                values = _evaluation(random, done)
                writer.write("eval", iteration=done, step=step, values=values)
        if status is not None:
            values = {"status": status, "error": error, "time/total_s": 312.5}
            writer.write("end", iteration=iterations, step=step, values=values)
    return run_dir


def _header(config: dict[str, Any]) -> dict[str, Any]:
    return {
        "config": config,
        "fingerprint": "0123456789ab",
        "start_fingerprint": "ba9876543210",
        "versions": {"torch": "0.0-synthetic", "megatron-core": "0.0-synthetic"},
        "platform": {
            "device": "cpu (synthetic)",
            "native_dtypes": ["fp32", "bf16"],
            "wide_products": "FP32 accumulation, result rounded to FP16 (synthetic note)",
        },
        "rank_count": 2,
    }


def _evaluation(random: np.random.Generator, iteration: int) -> Step:
    return {
        "eval/accuracy": 0.5 + 0.008 * iteration + random.normal(0, 0.01),
        "eval/pass_at_k": 0.8,
        "eval/tokens_mean": 51.5,
        "time/eval_s": 1.1,
    }


def _step(random: np.random.Generator, precision: str, step: int, skips: tuple[int, ...]) -> Step:
    skipped = step in skips
    scaled = precision.startswith("fp16")
    return {
        "loss/policy": random.normal(0, 0.01),
        "loss/grad_norm": float("inf") if skipped else float(random.lognormal(-1, 0.3)),
        "loss/clip_fraction": 0.0,
        "loss/entropy": 0.4,
        "loss/ratio_mean": 1.0,
        "loss/ratio_max": 1.3,
        "loss/weight_max": 1.2,
        "loss/learning_rate": 1e-5,
        "precision/loss_scale": 2.0 ** (16 - sum(at < step for at in skips)) if scaled else 1.0,
        "precision/skipped": int(skipped),
        "precision/overflow_cause": "gradients" if skipped else "",
        "precision/grad_subnormal_share": float(random.uniform(0.01, 0.03)) if scaled else 0.0,
        "time/step_s": 0.5,
    }


def _iteration(
    random: np.random.Generator, precision: str, iteration: int, bonus: float, skipped: int
) -> Step:
    scale = sum(ROUNDING[part] for part in precision.split("/")) / len(precision.split("/"))
    ratios = random.normal(0, scale * 7, 128)
    scaled = precision.startswith("fp16")
    return {
        "reward/mean": float(0.5 + 0.01 * iteration + bonus + random.normal(0, 0.02)),
        "reward/accuracy": 0.6,
        "reward/zero_variance_share": 0.1,
        "response/tokens_mean": 50.0,
        "response/tokens_max": 96,
        "response/truncated_share": 0.01,
        "mismatch/k1_kl": float(scale**2 * 0.4),
        "mismatch/k3_kl": float(scale**2 * 0.5 * random.lognormal(0, 0.2)),
        "mismatch/abs_diff_mean": float(scale * random.lognormal(0, 0.1)),
        "mismatch/abs_diff_max": float(scale * 30),
        "mismatch/prob_diff_max": float(scale * 8),
        "mismatch/seq_log_ratio_mean": float(ratios.mean()),
        "mismatch/seq_log_ratio_std": float(ratios.std()),
        "mismatch/ess": float(1 - 40 * scale**2),
        "mismatch/ppl_ratio": float(1 + scale**2),
        "mismatch/num_tokens": 25600 + 100 * iteration,
        "mismatch/seq_log_ratios": ratios.tolist(),
        "precision/act_max_trainer": float(120 + iteration),
        "precision/act_max_rollout": float(118 + iteration),
        "precision/grad_subnormal_share": 0.02 if scaled else 0.0,
        "precision/loss_scale": 2.0 ** (16 - skipped) if scaled else 1.0,
        "precision/skipped_total": skipped,
        "sync/s": 0.08,
        "sync/bytes": 2_500_000,
        "sync/verified": 1,
        "sync/weight_version": iteration + 1 - skipped,
        "time/rollout_s": 4.2,
        "time/reward_s": 0.05,
        "time/old_logprobs_s": 0.0,
        "time/train_s": 2.0 if precision == "bf16" else 3.1,
        "time/sync_s": 0.08,
        "time/eval_s": 0.3,
        "time/other_s": 0.2,
        "time/iteration_s": 6.83 if precision == "bf16" else 7.93,
        "throughput/rollout_tokens_per_s": 6100.0,
        "throughput/tokens_per_s": 3700.0,
        "memory/peak_gib": 3.2,
    }
