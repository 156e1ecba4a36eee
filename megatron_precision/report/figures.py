"""The table of final figures: one number a run and a quantity, and the ratio of two runs.

Every figure says how it was made from the events, so that a number in the docs can be traced.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_precision.report.runs import RunData, series

Reduction = Callable[[RunData, str], float | None]


@dataclass(frozen=True)
class Figure:
    """A row of the table.

    Attributes:
        key: its name in the JSON.
        label: its name on the page.
        unit: of the values; "" for a plain number.
        metric: the metric it is made of.
        reduce: makes one number of a run's events; None where the run has no such metric.
        how: the reduction in words.
        compared: whether a ratio of two runs says anything.
    """

    key: str
    label: str
    unit: str
    metric: str
    reduce: Reduction
    how: str
    compared: bool = True


@dataclass(frozen=True)
class FinalTable:
    """The figures of several runs.

    Attributes:
        runs: the runs, one a column.
        values: by figure key, one value a run; None where a run has none.
        pair: indices (numerator, denominator) of the two runs compared, or None.
        ratios: by figure key, numerator over denominator; None where undefined.
    """

    runs: list[RunData]
    values: dict[str, list[float | None]]
    pair: tuple[int, int] | None
    ratios: dict[str, float | None]

    def value(self, key: str, run: int) -> float | None:
        """Return one figure of one run."""
        return self.values[key][run]


def last_quarter(values: list[Any]) -> list[Any]:
    """Return the last quarter of a list, at least one element if there is one."""
    return values[-max(1, len(values) // 4) :] if values else []


def _token_weighted_mean(run: RunData, metric: str) -> float | None:
    """Return sum_i n_i x_i / sum_i n_i with n_i = mismatch/num_tokens of iteration i."""
    pairs = [
        (float(event[metric]), float(event["mismatch/num_tokens"]))
        for event in run.iterations
        if metric in event and event.get("mismatch/num_tokens", 0) > 0
    ]
    total = sum(weight for _, weight in pairs)
    return sum(value * weight for value, weight in pairs) / total if pairs else None


def _largest(run: RunData, metric: str) -> float | None:
    values = series(run.iterations, metric, "iteration")[1]
    if any(math.isnan(value) for value in values):
        return math.nan
    return max(values, default=None)


def _mean(run: RunData, metric: str) -> float | None:
    values = series(run.iterations, metric, "iteration")[1]
    return sum(values) / len(values) if values else None


def _mean_of_steps(run: RunData, metric: str) -> float | None:
    values = series(run.steps, metric, "step")[1]
    return sum(values) / len(values) if values else None


def _sum_of_steps(run: RunData, metric: str) -> float | None:
    values = series(run.steps, metric, "step")[1]
    return sum(values) if values else None


def _mean_of_last_quarter(run: RunData, metric: str) -> float | None:
    values = last_quarter(series(run.iterations, metric, "iteration")[1])
    return sum(values) / len(values) if values else None


def _last_eval(run: RunData, metric: str) -> float | None:
    values = series(run.evals, metric, "iteration")[1]
    return values[-1] if values else None


def _last_iteration(run: RunData, metric: str) -> float | None:
    values = series(run.iterations, metric, "iteration")[1]
    return values[-1] if values else None


def _mean_over_time(run: RunData, metric: str) -> float | None:
    """Divide the tokens of all iterations by their seconds: sum_i rate_i s_i / sum_i s_i."""
    pairs = [
        (float(event[metric]), float(event["time/iteration_s"]))
        for event in run.iterations
        if metric in event and "time/iteration_s" in event
    ]
    total_s = sum(seconds for _, seconds in pairs)
    return sum(rate * seconds for rate, seconds in pairs) / total_s if total_s else None


_WEIGHTED = "token-weighted mean over iterations"
_MAXIMUM = "largest of all iterations"
_QUARTER = "mean of the last quarter of iterations"
_MEAN = "mean over iterations"
_STEPS = "mean over steps"

FIGURES: tuple[Figure, ...] = tuple(
    Figure(*row)
    for row in (
        ("k1", "Mismatch k1 KL", "nats/token", "mismatch/k1_kl", _token_weighted_mean, _WEIGHTED),
        ("k3", "Mismatch k3 KL", "nats/token", "mismatch/k3_kl", _token_weighted_mean, _WEIGHTED),
        ("abs_diff_mean", "Absolute log-prob difference, mean", "nats",
         "mismatch/abs_diff_mean", _token_weighted_mean, _WEIGHTED),
        ("abs_diff_max", "Absolute log-prob difference, max", "nats",
         "mismatch/abs_diff_max", _largest, _MAXIMUM),
        ("prob_diff_max", "Probability difference, max", "",
         "mismatch/prob_diff_max", _largest, _MAXIMUM),
        ("seq_log_ratio_mean", "Sequence log-ratio, mean", "nats",
         "mismatch/seq_log_ratio_mean", _token_weighted_mean, _WEIGHTED),
        ("seq_log_ratio_std", "Sequence log-ratio, std", "nats",
         "mismatch/seq_log_ratio_std", _token_weighted_mean, _WEIGHTED),
        ("ess", "Effective sample size", "share",
         "mismatch/ess", _token_weighted_mean, _WEIGHTED),
        ("ppl_ratio", "Perplexity ratio", "",
         "mismatch/ppl_ratio", _token_weighted_mean, _WEIGHTED),
        ("final_reward", "Training reward, final", "",
         "reward/mean", _mean_of_last_quarter, _QUARTER),
        ("final_eval_accuracy", "Evaluation accuracy, final", "share",
         "eval/accuracy", _last_eval, "last evaluation"),
        ("tokens_per_s", "Throughput", "tokens/s",
         "throughput/tokens_per_s", _mean_over_time, "all tokens over all seconds"),
        ("rollout_tokens_per_s", "Rollout throughput", "tokens/s",
         "throughput/rollout_tokens_per_s", _mean, _MEAN),
        ("iteration_s", "Time per iteration", "s", "time/iteration_s", _mean, _MEAN),
        ("step_s", "Time per step", "s", "time/step_s", _mean_of_steps, _STEPS),
        ("sync_s", "Weight sync", "s", "sync/s", _mean, _MEAN),
        ("skipped_steps", "Skipped steps", "",
         "precision/skipped", _sum_of_steps, "sum over steps"),
        ("loss_scale", "Loss scale, final", "",
         "precision/loss_scale", _last_iteration, "last iteration", False),
        ("grad_subnormal_share", "Subnormal or zero gradient entries", "share",
         "precision/grad_subnormal_share", _mean_of_steps, _STEPS),
        ("act_max_trainer", "Largest activation, trainer", "",
         "precision/act_max_trainer", _largest, _MAXIMUM),
        ("act_max_rollout", "Largest activation, rollout engine", "",
         "precision/act_max_rollout", _largest, _MAXIMUM),
        ("peak_gib", "Peak memory", "GiB", "memory/peak_gib", _largest, _MAXIMUM),
    )
)  # fmt: skip


def final_figures(runs: list[RunData]) -> FinalTable:
    """Reduce every run to its figures and divide the pair of runs that is compared."""
    values = {figure.key: [figure.reduce(run, figure.metric) for run in runs] for figure in FIGURES}
    pair = compared_pair(runs)
    ratios: dict[str, float | None] = {figure.key: None for figure in FIGURES}
    if pair:
        for figure in FIGURES:
            row = values[figure.key]
            if figure.compared:
                ratios[figure.key] = _ratio(row[pair[0]], row[pair[1]])
    return FinalTable(runs, values, pair, ratios)


def compared_pair(runs: list[RunData]) -> tuple[int, int] | None:
    """Return the runs to compare: the first BF16 and the first FP16 run with iterations.

    Without both, two runs are compared in the order given; otherwise there is no pair.
    """
    with_data = [number for number, run in enumerate(runs) if run.iterations]
    bf16 = [number for number in with_data if runs[number].policy == "bf16"]
    fp16 = [number for number in with_data if runs[number].policy == "fp16"]
    if bf16 and fp16:
        return bf16[0], fp16[0]
    if len(with_data) == 2:
        return with_data[0], with_data[1]
    return None


def ratio_label(table: FinalTable) -> str:
    """Return `BF16 / FP16`, or "" if no two runs are compared."""
    if table.pair is None:
        return ""
    return " / ".join(table.runs[number].label for number in table.pair)


def text_table(table: FinalTable) -> str:
    """Format the figures as plain text, as wide as needed, without control codes."""
    header = ["", *(run.label for run in table.runs), ratio_label(table)]
    rows = [header]
    for figure in FIGURES:
        values = table.values[figure.key]
        if all(value is None for value in values):
            continue
        unit = f" ({figure.unit})" if figure.unit else ""
        rows.append(
            [
                figure.label + unit,
                *(number_text(value) for value in values),
                ratio_text(table.ratios[figure.key]) if table.pair else "",
            ]
        )
    if table.pair is None:
        rows = [row[:-1] for row in rows]
    widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
    lines = [_aligned(row, widths) for row in rows]
    lines.insert(1, "-" * len(lines[0]))
    return "\n".join(line.rstrip() for line in lines)


def number_text(value: float | None) -> str:
    """Format four significant digits, scientific if small, with commas; a dash for None.

    Near one (an effective sample size, a ratio) it is the distance from one that counts, and six
    decimals are shown.
    """
    if value is None:
        return "-"
    if not math.isfinite(value):
        return str(value)
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if abs(value - 1) < 1e-2:
        return f"{value:.6f}"
    if abs(value) < 1e-3:
        return f"{value:.2e}"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}"


def ratio_text(value: float | None) -> str:
    """Format a ratio to three significant digits with a times sign; a dash for None."""
    if value is None:
        return "-"
    if abs(value) >= 1000:
        return f"{value:,.0f}×"
    return f"{value:.3g}×"


def _aligned(row: list[str], widths: list[int]) -> str:
    first = row[0].ljust(widths[0])
    return "  ".join([first, *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])


def _ratio(numerator: float | None, denominator: float | None) -> float | None:
    if numerator is None or denominator is None or denominator == 0:
        return None
    ratio = numerator / denominator
    return ratio if math.isfinite(ratio) else None
