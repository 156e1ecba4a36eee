"""The report's figures, drawn with matplotlib from the events of one or more runs.

Each function returns a figure, or None where no run has what it shows. A run has one colour in
every figure. Nothing here touches matplotlib's global state, so plots can be made in any process.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, PercentFormatter

from megatron_precision.report.findings import FP16_MAX, PHASES, phase_seconds
from megatron_precision.report.runs import RunData, series

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9,
    "axes.labelcolor": "#333333",
    "axes.edgecolor": "#888888",
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e0",
    "grid.linewidth": 0.6,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.solid_capstyle": "round",
    "figure.dpi": 100,
    "savefig.dpi": 200,
    "figure.facecolor": "white",
}
HALF, FULL = (5.2, 3.1), (10.6, 3.3)  # inches: half or the whole width of the page
PHASE_COLOURS = ("#35608d", "#8fb8d8", "#7ea172", "#c8a04f", "#b5544a", "#8a6fa8", "#b9b9b4")
SMOOTHING = 5  # iterations in the thick line's moving mean
_BINS = 100
_CENTRE = 0.999  # of the sequences are within the own-scale panels


@dataclass(frozen=True)
class Plot:
    """A figure: its file name, its caption in two parts, and the function that draws it."""

    name: str
    title: str
    caption: str
    draw: Callable[[list[RunData]], Figure | None]
    wide: bool = False


def reward(runs: list[RunData]) -> Figure | None:
    """Plot the mean training reward per iteration."""
    return _curves(runs, "iterations", "reward/mean", "mean reward", smooth=True)


def evaluation(runs: list[RunData]) -> Figure | None:
    """Plot the accuracy on held-out questions."""
    return _curves(runs, "evals", "eval/accuracy", "accuracy", marker="o")


def mismatch(runs: list[RunData]) -> Figure | None:
    """Plot k3 KL and the mean absolute log-prob difference, on log axes."""
    if not _any(runs, "mismatch/k3_kl", "mismatch/abs_diff_mean"):
        return None
    figure, axes = _figure(FULL, 2)
    for axis, metric, label in (
        (axes[0], "mismatch/k3_kl", "k3 KL (nats per token)"),
        (axes[1], "mismatch/abs_diff_mean", "mean |Δ log-prob| (nats)"),
    ):
        for run in runs:
            x, y = series(run.iterations, metric, "iteration")
            # A log axis has no place for zero; the gap in the line shows it.
            axis.plot(x, [v if v > 0 else math.nan for v in y], color=run.colour, label=run.label)
        _log_axis(axis)
        _finish(axis, "iteration", label)
    return figure


def sequence_log_ratios(runs: list[RunData]) -> Figure | None:
    """Plot the paper's figure 5: log pi/mu of whole sequences, all iterations pooled."""
    pooled = [(run, ratios) for run in runs if (ratios := pooled_log_ratios(run)).size]
    if not pooled:
        return None
    height = max(3.6, 1.5 * len(pooled))
    figure = Figure(figsize=(FULL[0], height), layout="constrained")
    grid = figure.add_gridspec(len(pooled), 2, width_ratios=(1.35, 1))
    together = figure.add_subplot(grid[:, 0])
    low = min(float(ratios.min()) for _, ratios in pooled)
    high = max(float(ratios.max()) for _, ratios in pooled)
    margin = 0.0 if high > low else 1e-9  # one value alone still needs a bin of some width
    edges = np.linspace(low - margin, high + margin, _BINS + 1).tolist()
    for run, ratios in pooled:
        weights = np.full(ratios.size, 1 / ratios.size)
        together.hist(ratios, edges, weights=weights, color=run.colour, alpha=0.35, log=True)
        together.hist(
            ratios, edges, weights=weights, color=run.colour, histtype="step", log=True,
            label=run.label, linewidth=1.4,
        )  # fmt: skip
    together.yaxis.set_major_formatter(FuncFormatter(_share_text))
    together.set_title("all on one scale")
    _finish(together, "log-ratio of a sequence (nats)", "share of sequences, log axis")
    for row, (run, ratios) in enumerate(pooled):
        alone = figure.add_subplot(grid[row, 1])
        ends = np.quantile(ratios, ((1 - _CENTRE) / 2, (1 + _CENTRE) / 2))
        middle = ratios[(ratios >= ends[0]) & (ratios <= ends[1])]
        alone.hist(middle, _BINS // 2, color=run.colour, alpha=0.75)
        alone.set_title(f"{run.label} on its own scale", color=run.colour)
        alone.text(
            0.99, 0.94, f"std {ratios.std():.2g} nats\n{ratios.size:,} sequences",
            transform=alone.transAxes, ha="right", va="top", fontsize=8, color="#333333",
        )  # fmt: skip
        alone.ticklabel_format(axis="x", style="sci", scilimits=(-3, 4))
        last = row == len(pooled) - 1
        _finish(alone, "log-ratio of a sequence (nats)" if last else "", "sequences", legend=False)
    return figure


def loss_scale(runs: list[RunData]) -> Figure | None:
    """Plot the loss scale of runs that have one, and the skipped steps of all."""
    if not _any(runs, "precision/loss_scale", "precision/skipped", kind="steps"):
        return None
    figure, axes = _figure(FULL, 2)
    for run in runs:
        x, y = series(run.steps, "precision/loss_scale", "step")
        if run.loss_scaling and x:
            axes[0].step(x, y, where="post", color=run.colour, label=run.label)
            skipped = [s for s in run.steps if s.get("precision/skipped")]
            at, scale = series(skipped, "precision/loss_scale", "step")
            axes[0].plot(at, scale, "x", color="#222222", markersize=5, mew=1.3)
        x, y = series(run.steps, "precision/skipped", "step")
        axes[1].step(x, np.cumsum(y), where="post", color=run.colour, label=run.label)
    if axes[0].lines:
        axes[0].set_yscale("log", base=2)
    else:
        axes[0].text(0.5, 0.5, "no run scales its loss", transform=axes[0].transAxes, ha="center")
    axes[1].yaxis.set_major_locator(MaxNLocator(integer=True))
    most = max(1.0, axes[1].get_ylim()[1])
    axes[1].set_ylim(-0.05 * most, most * 1.05)
    _finish(axes[0], "optimizer step", "loss scale")
    _finish(axes[1], "optimizer step", "skipped steps so far")
    return figure


def gradient_norm(runs: list[RunData]) -> Figure | None:
    """Plot the gradient norm before clipping; non-finite ones are marks on the top edge."""
    if not _any(runs, "loss/grad_norm", kind="steps"):
        return None
    figure, (axis,) = _figure(HALF, 1)
    for run in runs:
        x, y = series(run.steps, "loss/grad_norm", "step")
        axis.plot(x, y, color=run.colour, alpha=0.85, linewidth=1.0, label=run.label)
        lost = [at for at, value in zip(x, y, strict=True) if not math.isfinite(value)]
        axis.plot(
            lost, [0.985] * len(lost), "v", color=run.colour, markersize=5,
            transform=axis.get_xaxis_transform(),
        )  # fmt: skip
    _log_axis(axis)
    _finish(axis, "optimizer step", "gradient norm before clipping")
    return figure


def activations(runs: list[RunData]) -> Figure | None:
    """Plot the largest activation of both sides against the end of FP16's range."""
    sides = {"precision/act_max_trainer": "-", "precision/act_max_rollout": "--"}
    if not _any(runs, *sides):
        return None
    figure, (axis,) = _figure(HALF, 1)
    for run in runs:
        for metric, line in sides.items():
            x, y = series(run.iterations, metric, "iteration")
            if x:
                axis.plot(x, y, line, color=run.colour, label=run.label if line == "-" else None)
    axis.axhline(FP16_MAX, color="#222222", linewidth=1.0)
    axis.text(
        0.995, FP16_MAX, "65504, FP16's largest number ", fontsize=8, ha="right", va="bottom",
        transform=axis.get_yaxis_transform(),
    )  # fmt: skip
    axis.set_yscale("log")
    axis.set_ylim(top=FP16_MAX * 6)
    _finish(axis, "iteration", "largest |activation|")
    return figure


def subnormal_gradients(runs: list[RunData]) -> Figure | None:
    """Plot the share of gradient entries that are subnormal or zero in their dtype."""
    figure = _curves(
        runs, "steps", "precision/grad_subnormal_share", "gradient entries", smooth=False
    )
    if figure is not None:
        figure.axes[0].yaxis.set_major_formatter(PercentFormatter(1.0))
        figure.axes[0].set_ylim(bottom=0)
    return figure


def response_length(runs: list[RunData]) -> Figure | None:
    """Plot the mean tokens of a response."""
    return _curves(runs, "iterations", "response/tokens_mean", "tokens a response (mean)")


def time_by_phase(runs: list[RunData]) -> Figure | None:
    """Plot the mean seconds of an iteration, stacked by phase."""
    bars = [(run, seconds) for run in runs if (seconds := phase_seconds(run))]
    if not bars:
        return None
    figure = Figure(figsize=(FULL[0], 1.3 + 0.48 * len(bars)), layout="constrained")
    axis = figure.add_subplot()
    longest = max(sum(seconds.values()) for _, seconds in bars)
    named = set()
    for row, (_, seconds) in enumerate(bars):
        left = 0.0
        for (phase, _), colour in zip(PHASES, PHASE_COLOURS, strict=True):
            width = seconds.get(phase, 0.0)
            label = phase if width and phase not in named else None
            named |= {phase} if label else set()
            axis.barh(row, width, left=left, color=colour, height=0.62, label=label)
            if width > 0.06 * longest:
                axis.text(left + width / 2, row, f"{width:.2f}", color="white", ha="center",
                          va="center", fontsize=8)  # fmt: skip
            left += width
        axis.text(left, row, f"  {left:.2f} s", va="center", fontsize=8.5)
    axis.set_yticks(range(len(bars)), [run.label for run, _ in bars])
    axis.invert_yaxis()
    axis.set_xlim(right=longest * 1.1)
    axis.grid(axis="y", visible=False)
    axis.set_xlabel("seconds an iteration (mean)")
    figure.legend(loc="outside upper left", ncols=len(PHASES))
    return figure


def pooled_log_ratios(run: RunData) -> Any:
    """Return every finite sequence log-ratio of a run, [num_sequences] float64."""
    ratios = [r for event in run.iterations for r in event.get("mismatch/seq_log_ratios", [])]
    values = np.asarray(ratios, dtype=np.float64)
    return values[np.isfinite(values)]


def draw(plot: Plot, runs: list[RunData]) -> Figure | None:
    """Draw one plot in the report's style."""
    with mpl.rc_context(STYLE):
        return plot.draw(runs)


def _curves(
    runs: list[RunData], kind: str, metric: str, label: str, *, smooth: bool = False,
    marker: str = "",
) -> Figure | None:  # fmt: skip
    if not _any(runs, metric, kind=kind):
        return None
    axis_name = "step" if kind == "steps" else "iteration"
    figure, (axis,) = _figure(HALF, 1)
    for run in runs:
        x, y = series(getattr(run, kind), metric, axis_name)
        if smooth and len(y) >= 3 * SMOOTHING:
            axis.plot(x, y, color=run.colour, alpha=0.3, linewidth=0.9)
            half = SMOOTHING // 2
            mean = np.convolve(y, np.full(SMOOTHING, 1 / SMOOTHING), mode="valid")
            axis.plot(x[half : len(x) - half], mean, color=run.colour, label=run.label)
        else:
            axis.plot(x, y, color=run.colour, marker=marker, markersize=4, label=run.label)
    _finish(axis, "optimizer step" if axis_name == "step" else "iteration", label)
    return figure


def _any(runs: list[RunData], *metrics: str, kind: str = "iterations") -> bool:
    return any(
        metric in event for run in runs for event in getattr(run, kind) for metric in metrics
    )


def _figure(size: tuple[float, float], columns: int) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, columns, squeeze=False)
    return figure, list(axes[0])


def _log_axis(axis: Axes) -> None:
    """Set a log axis if some line has a positive point; matplotlib warns otherwise."""
    heights = np.concatenate([np.zeros(0), *(np.asarray(x.get_ydata(), float) for x in axis.lines)])
    if np.any(heights[np.isfinite(heights)] > 0):
        axis.set_yscale("log")


def _finish(axis: Axes, x_label: str, y_label: str, *, legend: bool = True) -> None:
    axis.set_xlabel(x_label)
    axis.set_ylabel(y_label)
    if x_label in ("iteration", "optimizer step"):
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    if legend and axis.get_legend_handles_labels()[0]:
        axis.legend(loc="best")


def _share_text(share: float, _: int) -> str:
    return f"{100 * share:g} %"


PLOTS = (
    Plot("reward", "Training reward.",
         f"Thin: every iteration; thick: mean of {SMOOTHING}. Look for curves that part.", reward),
    Plot("evaluation", "Evaluation accuracy.",
         "Held-out questions, sampled at the evaluation temperature.", evaluation),
    Plot("mismatch", "Training-inference mismatch.",
         "Same weights, same tokens, two engines: KL estimated by k3, and the mean absolute "
         "difference of a token's log-probability. Log axes: look for the distance between the "
         "lines and for growth.", mismatch, wide=True),
    Plot("sequence_log_ratios", "Distribution of sequence log-ratios.",
         "Trainer's log-probability of a whole response minus the rollout engine's, before the "
         "update, all iterations pooled. Left: one scale for all, so widths compare; right: each "
         "run's central 99.9 % on its own scale, so shapes show.", sequence_log_ratios, wide=True),
    Plot("loss_scale", "Loss scale and skipped steps.",
         "Left: runs with a loss scale only; × marks a skipped step. Right: skips added up, "
         "every run.", loss_scale, wide=True),
    Plot("gradient_norm", "Gradient norm.",
         "Before clipping, in units of the unscaled loss. A triangle on the top edge is a step "
         "whose norm was not finite.", gradient_norm),
    Plot("activations", "Largest activation.",
         "Solid: trainer; dashed: rollout engine. FP16 overflows at the line; BF16 does not.",
         activations),
    Plot("subnormal_gradients", "Subnormal gradients.",
         "Share of gradient entries that are subnormal or zero. A loss scale that is too "
         "small shows as a rising share.", subnormal_gradients),
    Plot("response_length", "Response length.",
         "Mean over an iteration's rollouts. A sequence's log-ratio is a sum over its tokens.",
         response_length),
    Plot("time_by_phase", "Where the time went.",
         "Mean over iterations; evaluations are spread over all of them.", time_by_phase,
         wide=True),
)  # fmt: skip
