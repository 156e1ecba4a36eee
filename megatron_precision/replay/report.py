"""Reports what a replay found: a table for the terminal, a picture, raw figures and log-probs."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray
from safetensors.numpy import save_file

from megatron_precision.config.schema import RunConfig
from megatron_precision.observe.dump import Dump
from megatron_precision.observe.metrics import finite
from megatron_precision.replay import findings
from megatron_precision.replay.findings import (
    Bucket,
    Pair,
    PointError,
    Scored,
    WorstToken,
    layout_words,
)
from megatron_precision.report.plots import STYLE

_DISTANCES = (("rollout", "fp32"), ("trainer", "fp32"), ("replay", "fp32"))


@dataclass(frozen=True)
class Replay:
    """The results of a replay.

    Attributes:
        facts: what was replayed, and how.
        pairs: sides against each other, over all response tokens that both scored.
        by_position, by_probability: of the token within its response; of the token in FP32.
        by_router_flips: of the layers that route the position which predicts the token otherwise
            than the engine did; empty where that is not known.
        engine_flips: share of tokens that each layer routes otherwise; None where not known.
        worst: tokens at which the trainer is farthest from the engine; where the run has no
            log-probs of the trainer, the replay.
        free, forced: errors of the activations by point.
        logprobs: [S, L] FP32, `replay` and `fp32`.
    """

    facts: dict[str, Any]
    pairs: list[Pair]
    by_position: list[Bucket]
    by_probability: list[Bucket]
    by_router_flips: list[Bucket]
    engine_flips: list[float] | None
    worst: list[WorstToken]
    free: list[PointError]
    forced: list[PointError]
    logprobs: dict[str, findings.Floats]

    @classmethod
    def of(cls, dump: Dump, config: RunConfig, model: str, scored: Scored) -> Replay:
        """Compare all sides.

        Args:
            config: of the replay.
            model: weights in place of the dump's own, or "".
        """
        arrays, header = dump.arrays, dump.header
        sides = {"rollout": arrays.rollout_logprobs, "replay": scored.replay, "fp32": scored.fp32}
        scored_by_all = arrays.response_mask
        if arrays.old_known.any():
            sides["trainer"] = arrays.old_logprobs
            scored_by_all = arrays.response_mask & arrays.old_known[:, None]
        wanted = [("trainer", "rollout"), ("replay", "trainer"), ("replay", "rollout"), *_DISTANCES]
        pairs = [
            findings.compare(
                a, b, sides, scored_by_all if "trainer" in (a, b) else arrays.response_mask
            )
            for a, b in wanted
            if a in sides and b in sides
        ]
        ours = "trainer" if "trainer" in sides else "replay"
        shown = [(ours, "rollout"), *((a, b) for a, b in _DISTANCES if a in ("rollout", ours))]
        number = findings.positions(arrays.response_mask)
        longest = int(number.max(initial=0)) + 1
        probability = np.exp(scored.fp32.astype(np.float64))
        ids = np.unique(arrays.tokens).tolist()
        run = header.config
        return cls(
            facts={
                "iteration": header.iteration,
                "recipe": run["recipe"],
                "reasons": list(header.reasons),
                "weight_versions": np.unique(arrays.weight_version).tolist(),
                "weights": model or "of the dump",
                "run_precision": run["precision"],
                "precision": config.precision,
                "layout": layout_words(config.parallel),
                "run_platform": header.platform,
                "sequences": len(arrays),
                "scored_by_trainer": int(arrays.old_known.sum()),
                "truncated": int(arrays.truncated.sum()),
                "grad_norms": list(header.grad_norms),
            },
            pairs=pairs,
            by_position=findings.buckets(
                number, findings.position_edges(longest), sides, shown, scored_by_all
            ),
            by_probability=findings.buckets(
                probability, findings.PROBABILITY_EDGES, sides, shown, scored_by_all
            ),
            by_router_flips=(
                []
                if scored.flipped_layers is None
                else findings.buckets(
                    _at_predicted(scored.flipped_layers),
                    findings.flip_edges(config.model.num_hidden_layers),
                    sides, shown, scored_by_all,
                )
            ),
            engine_flips=scored.engine_flips,
            worst=findings.worst_tokens(
                ours, "rollout", sides, scored_by_all, arrays.tokens, arrays.lengths,
                {token: dump.text(token) for token in ids},
            ),
            free=scored.free,
            forced=scored.forced,
            logprobs={"replay": scored.replay, "fp32": scored.fp32},
        )  # fmt: skip

    def pair(self, a: str, b: str) -> Pair | None:
        """Return the comparison of two sides; None if one of them is unknown."""
        return next((pair for pair in self.pairs if (pair.a, pair.b) == (a, b)), None)

    def lines(self) -> Iterator[str]:
        """Format the table for a person."""
        facts = self.facts
        versions = ", ".join(map(str, facts["weight_versions"]))
        yield (
            f"iteration {facts['iteration']} of {facts['recipe']} in {facts['run_precision']}, "
            f"weights of version {versions}; dumped: {'; '.join(facts['reasons'])}"
        )
        yield f"scored again in {facts['precision']}, {facts['layout']}, and in fp32"
        yield ""
        yield from self._pair_lines()
        yield ""
        yield from self.sentences()
        for title, rows in (
            ("position", self.by_position),
            ("probability", self.by_probability),
            ("router flips", self.by_router_flips),
        ):
            yield ""
            yield from _bucket_lines(title, rows)
        if self.forced:
            yield ""
            yield from self._point_lines()
        yield ""
        yield from self._worst_lines()

    def sentences(self) -> Iterator[str]:
        """Write sentences that interpret the figures."""
        again = self.pair("replay", "trainer")
        if again is not None and again.tokens == again.equal and not again.not_finite:
            yield "The replay's log-probs are the trainer's, bit for bit."
        elif again is not None:
            yield (
                f"The replay's log-probs differ from the trainer's at "
                f"{again.tokens - again.equal:,} of {again.tokens:,} tokens, by up to "
                f"{again.abs_max:.3g} nats."
            )
        ours = self.pair("trainer", "fp32") or self.pair("replay", "fp32")
        engine = self.pair("rollout", "fp32")
        if ours is not None and engine is not None and ours.abs_mean and engine.abs_mean:
            ratio = engine.abs_mean / ours.abs_mean
            name = {True: "engine", False: ours.a}[ratio > 1]
            far = max(ratio, 1 / ratio)
            yield f"The {name} is farther from FP32 on the same weights, {far:.2f} × in the mean."
        first = findings.parts_first(self.forced)
        if first is not None:
            yield (
                f"Given exact inputs, {first.name} adds the largest error: {first.mean:.3g} of its "
                f"output ({first.largest:.3g} at the worst token)."
            )

        routed = [(p.flipped_share, p.name) for p in self.free if p.flipped_share is not None]
        if routed:
            share, name = max(routed)
            yield f"Routers: at {name} {share:.2%} of the tokens go to other experts than in FP32."
        if self.engine_flips:
            share, number = max((share, n) for n, share in enumerate(self.engine_flips))
            name = findings.layer_name(number)
            yield (
                f"Engine: at {name} {share:.2%} of the tokens go to other experts than the "
                "engine's."
            )

    def _pair_lines(self) -> Iterator[str]:
        yield f"{'':<20}{'tokens':>9}{'mean |d|':>12}{'max |d|':>12}{'k3':>12}{'same bits':>11}"
        for pair in self.pairs:
            same = f"{pair.equal / pair.tokens:.1%}" if pair.tokens else "-"
            yield (
                f"{pair.a + ' - ' + pair.b:<20}{pair.tokens:>9,}{pair.abs_mean:>12.3g}"
                f"{pair.abs_max:>12.3g}{pair.k3:>12.3g}{same:>11}"
            ) + (f"   {pair.not_finite:,} not finite" if pair.not_finite else "")

    def _point_lines(self) -> Iterator[str]:
        free = {point.name: point for point in self.free}
        routed = any(point.flipped_share is not None for point in self.forced)
        yield (
            f"{'relative error of':<20}{'its own':>12}{'worst':>12}{'carried':>12}{'worst':>12}"
            + (f"{'router':>12}{'carried':>12}{'flipped':>10}" if routed else "")
        )
        for own in self.forced:
            carried = free[own.name]
            line = f"{own.name:<20}{own.mean:>12.3g}{own.largest:>12.3g}"
            line += f"{carried.mean:>12.3g}{carried.largest:>12.3g}"
            if own.router_mean is not None and carried.flipped_share is not None:
                line += f"{own.router_mean:>12.3g}{carried.router_mean:>12.3g}"
                line += f"{carried.flipped_share:>10.2%}"
            yield line
        yield "its own: with the FP32 reference's input; carried: with the errors of all before it"

    def _worst_lines(self) -> Iterator[str]:
        if not self.worst:
            return
        names = [n for n in ("rollout", "trainer", "replay", "fp32") if n in self.worst[0].logprobs]
        yield f"{'worst tokens':<16}{'d':>9}" + "".join(f"{name:>10}" for name in names)
        for worst in self.worst:
            values = "".join(f"{worst.logprobs[name]:>10.4f}" for name in names)
            place = f"seq {worst.sequence}, {worst.position}"
            context = f"{worst.before}⟦{worst.text}⟧{worst.after}".replace("\n", "⏎")
            yield f"{place:<16}{worst.difference:>9.4f}{values}  {context}"


def _at_predicted(values: NDArray[np.int32]) -> NDArray[np.float64]:
    """Shift [S, L] so that each token has the value of the position that predicts it."""
    found = np.zeros(values.shape)
    found[:, 1:] = values[:, :-1]
    return found


def _bucket_lines(title: str, rows: Sequence[Bucket]) -> Iterator[str]:
    if not rows:
        return
    yield f"{'mean |d| by ' + title:<24}{'tokens':>9}" + "".join(
        f"{n:>20}" for n in rows[0].abs_mean
    )
    for row in rows:
        means = "".join(f"{mean:>20.3g}" for mean in row.abs_mean.values())
        yield f"  {row.low:>8g} to {row.high:<10g}{row.tokens:>11,}{means}"


FIGURES = "replay.json"
PICTURE = "replay.png"
LOGPROBS = "logprobs.safetensors"


def write(replay: Replay, out: Path) -> None:
    """Write figures, picture and log-probs; the folder is made."""
    out.mkdir(parents=True, exist_ok=True)
    values = {
        part.name: getattr(replay, part.name)
        for part in dataclasses.fields(replay)
        if part.name != "logprobs"
    }
    text = json.dumps(finite(_plain(values)), indent=1, allow_nan=False)
    (out / FIGURES).write_text(text + "\n", encoding="utf-8")
    logprobs = {name: np.ascontiguousarray(array) for name, array in replay.logprobs.items()}
    save_file(logprobs, out / LOGPROBS)
    draw(replay).savefig(out / PICTURE, dpi=150)


def _plain(value: Any) -> Any:
    """Turn dataclasses into dictionaries, at any depth."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    assert value is None or isinstance(value, str | int | float), type(value)
    return value if not isinstance(value, float) or math.isfinite(value) else finite(value)


_COLOURS = ("#b5544a", "#35608d", "#7ea172")
_ROUTER = "#8a6fa8"


def draw(replay: Replay) -> Figure:
    """Plot errors by position, by probability and, if layers were compared, by layer."""
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
