"""The picture of a replay: both sides' tokens, by position, by layer, and the router."""

from __future__ import annotations

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from megatron_precision.observe.plots import STYLE
from megatron_precision.replay.report import Replay

_COLOURS = ("#b5544a", "#35608d", "#7ea172")
_ROUTER = "#8a6fa8"


def draw(replay: Replay) -> Figure:
    """By position, by probability, and by layer: three panels, two where no layer was compared."""
    with mpl.rc_context(STYLE):
        panels = 3 if replay.forced else 2
        figure = Figure(figsize=(4.6 * panels, 3.5), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False)[0]
        facts = replay.facts
        _buckets(axes[0], replay, "position")
        _buckets(axes[1], replay, "probability")
        if replay.forced:
            _layers(axes[2], replay)
        figure.suptitle(
            f"{facts['recipe']} in {facts['run_precision']}, iteration {facts['iteration']}, "
            f"scored again in {facts['precision']}, {facts['layout']}",
            x=0.01, ha="left", fontsize=10,
        )  # fmt: skip
        return figure


def _buckets(axis: Axes, replay: Replay, kind: str) -> None:
    rows = replay.by_position if kind == "position" else replay.by_probability
    names = list(rows[0].abs_mean) if rows else []
    at = np.arange(len(rows))
    for colour, name in zip(_COLOURS, names, strict=False):
        means = [row.abs_mean[name] or np.nan for row in rows]
        axis.plot(at, means, color=colour, marker="o", markersize=3.5, label=name)
    axis.set_xticks(at, [_range(row.low, row.high, kind) for row in rows], rotation=45)
    axis.set_yscale("log")
    axis.set_ylabel("mean |Δ log-prob| (nats)")
    where = "position in the response" if kind == "position" else "probability in FP32"
    axis.set_title(f"by {where}")
    if names:
        axis.legend()


def _range(low: float, high: float, kind: str) -> str:
    if kind == "position":
        return f"{low:g}" if high - low == 1 else f"{low:g}-{high - 1:g}"
    return f"{low:g}-{high:g}"


def _layers(axis: Axes, replay: Replay) -> None:
    at = np.arange(len(replay.forced))
    for points, label, style in ((replay.free, "carried", "-"), (replay.forced, "its own", "--")):
        means = [point.mean or np.nan for point in points]
        axis.plot(
            at, means, style, color=_COLOURS[1], marker="o", markersize=3.5,
            label=f"activations, {label}",
        )  # fmt: skip
    routed = [(n, p) for n, p in enumerate(replay.free) if p.router_mean is not None]
    if routed:
        axis.plot(
            [n for n, _ in routed], [p.router_mean or np.nan for _, p in routed],
            color=_ROUTER, marker="s", markersize=3.5, label="router logits, carried",
        )  # fmt: skip
        axis.plot(
            [n for n, _ in routed], [p.flipped_share or np.nan for _, p in routed],
            color=_ROUTER, marker="x", linestyle=":", label="share of tokens sent to other experts",
        )  # fmt: skip
    axis.set_xticks(at, [point.name for point in replay.forced], rotation=45, ha="right")
    axis.set_yscale("log")
    axis.set_ylabel("mean relative error against FP32")
    axis.set_title("by layer")
    axis.legend()
