"""The comparison's figures, drawn with matplotlib in the style of a run's report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from megatron_precision.mismatch.analysis import Cell, Class, sequence_log_ratios
from megatron_precision.mismatch.comparison import Floats, Ints
from megatron_precision.report.plots import STYLE

COLOURS = {"bf16": "#b5544a", "fp16": "#35608d", "fp32": "#7ea172"}
NAMES = {"bf16": "BF16", "fp16": "FP16", "fp32": "FP32"}
SCATTER_POINTS = 6000
_BINS = 40


@dataclass(frozen=True)
class Tokens:
    """Both sides' log-probs of the tokens of one pair of dtypes, and the responses' lengths."""

    train_logprobs: Floats
    rollout_logprobs: Floats
    lengths: Ints


def figure_five(diagonal: Mapping[str, Tokens]) -> Figure:
    """Plot both sides' token probabilities and responses' log-ratios, for each dtype.

    Args:
        diagonal: by the dtype that both sides have.
    """
    with rc_context(STYLE):
        figure = Figure(figsize=(3.3 * len(diagonal) + 4.2, 3.4), layout="constrained")
        widths = [1.0] * len(diagonal) + [1.25]
        grid = figure.add_gridspec(1, len(widths), width_ratios=widths)
        for column, (dtype, tokens) in enumerate(diagonal.items()):
            axis = figure.add_subplot(grid[column])
            chosen = _some(len(tokens.train_logprobs))
            mu = np.exp(tokens.rollout_logprobs[chosen])
            pi = np.exp(tokens.train_logprobs[chosen])
            axis.plot([0, 1], [0, 1], color="#999999", linewidth=0.7)
            axis.plot(mu, pi, ".", color=COLOURS[dtype], markersize=2, alpha=0.5)
            axis.set_aspect("equal")
            axis.set_title(f"{NAMES[dtype]}: sampled tokens")
            axis.set_xlabel("probability in vLLM, μ")
            axis.set_ylabel("probability in Megatron, π" if column == 0 else "")
        axis = figure.add_subplot(grid[len(diagonal)])
        ratios = {
            dtype: sequence_log_ratios(t.train_logprobs - t.rollout_logprobs, t.lengths)
            for dtype, t in diagonal.items()
        }
        largest = max(float(np.abs(r).max(initial=0.0)) for r in ratios.values()) or 1e-9
        edges = np.linspace(-largest, largest, _BINS + 1).tolist()
        for dtype, values in ratios.items():
            weights = np.full(values.size, 1 / values.size)
            label = f"{NAMES[dtype]}, std {values.std():.2g}"
            axis.hist(values, edges, weights=weights, color=COLOURS[dtype], alpha=0.3)
            axis.hist(
                values, edges, weights=weights, color=COLOURS[dtype], histtype="step",
                label=label, linewidth=1.4,
            )  # fmt: skip
        axis.set_title("log π/μ of whole responses")
        axis.set_xlabel("nats")
        axis.set_ylabel("share of responses")
        axis.legend()
        return figure


def classes(cells: Sequence[Cell]) -> Figure:
    """Plot k3 by position, and the mean log-prob difference by probability."""
    with rc_context(STYLE):
        figure = Figure(figsize=(10.6, 3.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        for cell in cells:
            label, colour = NAMES[cell.train], COLOURS[cell.train]
            x, y = _steps(cell.by_position, "k3")
            left.plot(x, y, "o-", color=colour, label=label, markersize=3.5)
            names = [_span(c) for c in cell.by_probability]
            values = [c.abs_mean for c in cell.by_probability]
            right.plot(names, values, "o-", color=colour, label=label, markersize=3.5)
        for axis in (left, right):
            axis.set_yscale("log")
            axis.legend()
        left.set_xscale("log", base=2)
        left.xaxis.set_major_formatter("{x:g}")
        left.set_xlabel("position in the response (tokens)")
        left.set_ylabel("k3 KL (nats per token)")
        right.set_xlabel("μ of the sampled token")
        right.set_ylabel("mean |Δ log-prob| (nats)")
        return figure


def routing(cells: Sequence[Cell]) -> Figure:
    """Plot an MoE model's flipped tokens by layer, and the cost of a flip."""
    with rc_context(STYLE):
        figure = Figure(figsize=(10.6, 3.3), layout="constrained")
        left, right = figure.subplots(1, 2)
        for cell in cells:
            assert cell.router is not None
            label, colour = NAMES[cell.train], COLOURS[cell.train]
            shares = [share or np.nan for share in cell.router["by_layer"]]
            left.plot(range(len(shares)), shares, "o-", color=colour, label=label, markersize=3.5)
            names = [f"≤ {c.high:g}" if c.high else "0" for c in cell.by_router_flips]
            values = [c.abs_mean for c in cell.by_router_flips]
            right.plot(names, values, "o-", color=colour, label=label, markersize=3.5)
        for axis in (left, right):
            axis.set_yscale("log")
            axis.legend()
        left.xaxis.get_major_locator().set_params(integer=True)
        left.set_xlabel("layer")
        left.set_ylabel("share of tokens at other experts")
        right.set_xlabel("layers that route the token otherwise")
        right.set_ylabel("mean |Δ log-prob| (nats)")
        return figure


def _steps(found: Sequence[Class], name: str) -> tuple[list[float], list[float]]:
    kept = [c for c in found if getattr(c, name) > 0]
    return [c.high for c in kept], [getattr(c, name) for c in kept]


def _span(found: Class) -> str:
    return f"≤ {found.high:g}"


def _some(count: int) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Choose at most `SCATTER_POINTS` tokens, the same ones each time."""
    if count <= SCATTER_POINTS:
        return np.arange(count)
    return np.sort(np.random.default_rng(0).choice(count, SCATTER_POINTS, replace=False))
