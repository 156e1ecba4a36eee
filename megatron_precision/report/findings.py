"""Sentences about what the runs did, every one computed from their events.

Nothing here knows what the outcome should be: a run that favours BF16 gets the sentences that
say so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from megatron_precision.observe.sinks import power_of_two
from megatron_precision.report.figures import FinalTable, last_quarter, number_text
from megatron_precision.report.runs import RunData, series

FP16_MAX = 65504.0
PHASES = (
    ("rollout", "time/rollout_s"),
    ("reward", "time/reward_s"),
    ("old log-probs", "time/old_logprobs_s"),
    ("training", "time/train_s"),
    ("weight sync", "time/sync_s"),
    ("evaluation", "time/eval_s"),
    ("other", "time/other_s"),
)
_FEWEST_POINTS = 4  # a standard error of fewer points says nothing


@dataclass(frozen=True)
class Difference:
    """The mean of a - b over paired points, with its standard error; both in the metric's unit."""

    mean: float
    standard_error: float
    num_points: int

    @property
    def within_noise(self) -> bool:
        """True if zero is within the 95 % interval of the mean by Student's t."""
        return abs(self.mean) <= students_t(self.num_points - 1) * self.standard_error


def findings(table: FinalTable) -> list[str]:
    """Write every finding of the runs as plain text, most important first."""
    sentences: list[str] = []
    if table.pair is not None:
        sentences += _mismatch_of_pair(table)
        sentences += _reward_of_pair(table)
        sentences += _eval_of_pair(table)
    else:
        sentences += [s for run in table.runs for s in _learning_of_run(run)]
    for number in range(len(table.runs)):
        sentences += _range_of_run(table, number)
    sentences += [s for run in table.runs for s in (*_syncs_of_run(run), *_time_of_run(run))]
    sentences += [f"{run.label}: {problem}." for run in table.runs for problem in run.problems]
    return sentences


def students_t(degrees: int) -> float:
    """Return Student's t at 97.5 %: half a 95 % interval's width in standard errors.

    Fisher and Cornish's expansion about the normal quantile z = 1.96; within 1 % from 3 degrees
    of freedom on.
    """
    z = 1.959964
    terms: tuple[float, ...] = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum((term / degrees**power for power, term in enumerate(terms)), 0.0)


def paired_difference(first: RunData, second: RunData, metric: str) -> Difference | None:
    """Subtract two runs by iteration, over the last quarter of the shared iterations.

    The standard error is the deviation of the differences over the root of their number. It
    covers the scatter between iterations, taken as independent; not that between seeds.

    Returns:
        None where fewer than four finite points are left.
    """
    a = dict(zip(*series(first.iterations, metric, "iteration"), strict=True))
    b = dict(zip(*series(second.iterations, metric, "iteration"), strict=True))
    gaps = [a[at] - b[at] for at in last_quarter(sorted(a.keys() & b.keys()))]
    gaps = [gap for gap in gaps if math.isfinite(gap)]
    if len(gaps) < _FEWEST_POINTS:
        return None
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / (len(gaps) - 1)
    return Difference(mean, math.sqrt(variance / len(gaps)), len(gaps))


def _mismatch_of_pair(table: FinalTable) -> list[str]:
    assert table.pair is not None
    upper, lower = (table.runs[number] for number in table.pair)
    parts = []
    for key, name in (
        ("k3", "mean k3 mismatch"),
        ("abs_diff_mean", "mean absolute log-prob difference"),
        ("seq_log_ratio_std", "spread (std) of the sequence log-ratio"),
    ):
        ratio = table.ratios[key]
        if ratio is not None:
            values = " against ".join(number_text(table.value(key, n)) for n in table.pair)
            parts.append(f"its {name} is {_times(ratio)} that of {lower.label} ({values} nats)")
    if not parts:
        return ["No mismatch was measured in both runs, so there is nothing to compare there."]
    return [f"{upper.label} against {lower.label}: {'; '.join(parts)}.", *_trend(table)]


def _trend(table: FinalTable) -> list[str]:
    """Describe how k3 changed from the first to the last quarter of training."""
    parts = []
    for run in table.runs:
        values = series(run.iterations, "mismatch/k3_kl", "iteration")[1]
        first, last = values[: len(values) // 4], values[-(len(values) // 4) :]
        if len(first) < _FEWEST_POINTS or not sum(first) > 0 or not math.isfinite(sum(last)):
            continue
        parts.append(f"×{sum(last) / sum(first):.2g} in {run.label}")
    if not parts:
        return []
    return [
        "From the first to the last quarter of training, mean k3 mismatch changed by "
        + ", ".join(parts)
        + "."
    ]


def _reward_of_pair(table: FinalTable) -> list[str]:
    assert table.pair is not None
    upper, lower = (table.runs[number] for number in table.pair)
    gap = paired_difference(upper, lower, "reward/mean")
    if gap is None:
        return ["Too few shared iterations to say whether the training rewards differ."]
    means = " and ".join(
        f"{table.runs[n].label} {number_text(table.value('final_reward', n))}" for n in table.pair
    )
    amount = f"{gap.mean:+.4f} ± {gap.standard_error:.4f}"
    scope = (
        f"{upper.label} - {lower.label} = {amount} (mean and standard error over the last "
        f"{gap.num_points} shared iterations, taken as independent; one seed each)"
    )
    if gap.within_noise:
        verdict = "Training rewards coincide within noise"
    else:
        higher = upper if gap.mean > 0 else lower
        verdict = f"Training reward is higher in {higher.label}"
    return [f"{verdict}: last-quarter means {means}; {scope}."]


def _eval_of_pair(table: FinalTable) -> list[str]:
    assert table.pair is not None
    first, second = (table.value("final_eval_accuracy", number) for number in table.pair)
    labels = [table.runs[number].label for number in table.pair]
    if first is None or second is None:
        found = zip(labels, (first, second), strict=True)
        absent = " and ".join(label for label, value in found if value is None)
        return [f"No evaluation in {absent}, so accuracies are not compared."]
    text = f"Last evaluation: {labels[0]} {first:.3f}, {labels[1]} {second:.3f}"
    questions = table.runs[table.pair[0]].config.get("task", {}).get("eval_questions")
    if not questions:
        return [text + "."]
    # Samples of one question are alike, so a question counts once: an upper bound of the error.
    error = math.sqrt((first * (1 - first) + second * (1 - second)) / questions)
    verdict = "less" if abs(first - second) <= 2 * error else "more"
    return [
        f"{text}; they differ by {verdict} than two standard errors of the difference (of "
        f"{error:.3f}, an upper bound for {questions} questions)."
    ]


def _learning_of_run(run: RunData) -> list[str]:
    values = series(run.iterations, "reward/mean", "iteration")[1]
    if len(values) < 4 * _FEWEST_POINTS:
        return []
    first, last = values[: len(values) // 4], last_quarter(values)
    return [
        f"{run.label}: mean training reward went from {sum(first) / len(first):.3f} in the first "
        f"quarter to {sum(last) / len(last):.3f} in the last."
    ]


def _range_of_run(table: FinalTable, number: int) -> list[str]:
    run = table.runs[number]
    parts = []
    skipped = table.value("skipped_steps", number)
    if skipped is not None:
        causes = _causes(run.steps)
        parts.append(f"skipped {skipped:.0f} of {len(run.steps)} optimizer steps{causes}")
    scales = series(run.iterations, "precision/loss_scale", "iteration")[1]
    if run.loss_scaling and scales:
        low, high = (power_of_two(scale) for scale in (min(scales), max(scales)))
        moved = f"stayed at {low}" if low == high else f"moved between {low} and {high}"
        parts.append(f"its loss scale {moved}")
    activations = [
        value
        for key in ("act_max_trainer", "act_max_rollout")
        if (value := table.value(key, number)) is not None
    ]
    if activations and "fp16" in run.policy:
        share = max(activations) / FP16_MAX
        parts.append(
            f"its largest activation was {number_text(max(activations))}, {_percent(share)} of "
            "FP16's largest number"
        )
    return [f"{run.label} {', '.join(parts)}."] if parts else []


def _causes(steps: list[dict[str, Any]]) -> str:
    causes = [
        str(s["precision/overflow_cause"]) for s in steps if s.get("precision/overflow_cause")
    ]
    if not causes:
        return ""
    counts = ", ".join(f"{causes.count(cause)} by {cause}" for cause in sorted(set(causes)))
    return f" ({counts.replace('_', ' ')})"


def _syncs_of_run(run: RunData) -> list[str]:
    verified = series(run.iterations, "sync/verified", "iteration")
    failed = [str(at) for at, value in zip(*verified, strict=True) if value != 1]
    if not failed:
        return []
    return [f"{run.label}: the weight sync of iteration {', '.join(failed)} was not verified."]


def _time_of_run(run: RunData) -> list[str]:
    seconds = phase_seconds(run)
    total = sum(seconds.values())
    if not total:
        return []
    shares = sorted(((s / total, name) for name, s in seconds.items()), reverse=True)[:3]
    return [
        f"{run.label} spent its time on "
        + ", ".join(f"{name} ({_percent(share)})" for share, name in shares)
        + f"; {total:.2f} s an iteration, evaluations included."
    ]


def phase_seconds(run: RunData) -> dict[str, float]:
    """Return the mean seconds per iteration by phase; phases without events are left out.

    Evaluation is what the `eval` events say, spread over all iterations: evaluations lie between
    iterations, and the first before them.
    """
    if not run.iterations:
        return {}
    seconds = {}
    for name, metric in PHASES:
        evaluated = metric == "time/eval_s" and run.evals
        values = series(run.evals if evaluated else run.iterations, metric, "iteration")[1]
        if values:
            seconds[name] = sum(values) / len(run.iterations)
    return seconds


def _times(ratio: float) -> str:
    return f"{ratio:,.0f}×" if ratio >= 100 else f"{ratio:.2g}×" if ratio < 10 else f"{ratio:.1f}×"


def _percent(share: float) -> str:
    return f"{100 * share:.2g} %" if share < 0.1 else f"{100 * share:.0f} %"
