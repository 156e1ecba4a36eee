"""Writes the report of a mismatch comparison: an HTML page, its PNGs and its numbers as JSON."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_precision.config.schema import to_dict
from megatron_precision.mismatch import plots
from megatron_precision.mismatch.analysis import Cell, cell
from megatron_precision.mismatch.comparison import Comparison, Samples, read_samples, read_scores
from megatron_precision.mismatch.plots import NAMES, Tokens
from megatron_precision.report.html import save_image, write_page

_DPI = 160
# (figure, its name, what it is); the first is the paper's headline.
FIGURES: tuple[tuple[str, str, str], ...] = (
    ("statistics.k3_kl", "k3 KL", "nats a token, of KL(μ‖π)"),
    ("statistics.abs_diff_mean", "mean |Δ log-prob|", "nats"),
    ("seq_k3", "KL of a response, k3", "nats, of KL(μ‖π) of whole responses"),
    ("statistics.seq_log_ratio_std", "spread of log π/μ of a response", "nats"),
    ("slope_per_1k", "log π/μ that 1,000 tokens add", "nats, least squares through the origin"),
)
# Further figures of an MoE model.
ROUTED: tuple[tuple[str, str, str], ...] = (
    ("router.flip_share", "routed otherwise", "share of (token, layer) at other experts"),
    ("replayed.k3_kl", "k3 KL, the engine's experts replayed", "nats a token; R3"),
    ("replayed.abs_diff_mean", "mean |Δ log-prob|, the engine's experts replayed", "nats; R3"),
)


@dataclass(frozen=True)
class Found:
    """A finished comparison, read from its files."""

    comparison: Comparison
    samples: dict[str, Samples]
    tokens: dict[tuple[str, str], Tokens]
    cells: dict[tuple[str, str], Cell]
    score_facts: dict[tuple[str, str], dict[str, Any]]

    @property
    def figures(self) -> tuple[tuple[str, str, str], ...]:
        """List the figures that get a matrix: (path in a cell, name, unit)."""
        routed = all(cell.router is not None for cell in self.cells.values())
        return (*FIGURES, *ROUTED) if routed else FIGURES


def read(comparison: Comparison) -> Found:
    """Read the files of all parts and compute every cell."""
    samples: dict[str, Samples] = {
        r: read_samples(comparison.sample_file(r)) for r in comparison.rollout
    }
    tokens: dict[tuple[str, str], Tokens] = {}
    cells: dict[tuple[str, str], Cell] = {}
    facts: dict[tuple[str, str], dict[str, Any]] = {}
    for train in comparison.train:
        for rollout in comparison.rollout:
            at = (train, rollout)
            scores = read_scores(comparison.score_file(train, rollout))
            engine = samples[rollout]
            facts[at] = {k: v for k, v in scores.facts.items() if k != "router"}  # in the cell
            tokens[at] = Tokens(scores.train_logprobs, engine.rollout_logprobs, engine.lengths)
            cells[at] = cell(train, rollout, scores, engine.rollout_logprobs, engine.lengths)
    return Found(comparison, samples, tokens, cells, facts)


def write(comparison: Comparison) -> str:
    """Write `report.html`, `report.json` and the PNGs into the comparison's folder.

    Returns:
        The matrices as plain text, for the console.
    """
    found = read(comparison)
    pictures = {}
    diagonal = [d for d in comparison.train if d in comparison.rollout]
    shown = [d for d in diagonal if d != "fp32"] or diagonal
    if shown:
        pictures["figure5"] = plots.figure_five({d: found.tokens[d, d] for d in shown})
        pictures["classes"] = plots.classes([found.cells[d, d] for d in diagonal])
        routed = [found.cells[d, d] for d in diagonal if found.cells[d, d].router is not None]
        if routed:
            pictures["routing"] = plots.routing(routed)
    images = {
        name: save_image(figure, comparison.out / f"{name}.png", _DPI)
        for name, figure in pictures.items()
    }
    (comparison.out / "report.json").write_text(
        json.dumps(as_json(found), indent=1, allow_nan=False) + "\n", encoding="utf-8"
    )
    write_page(
        comparison.out / "report.html",
        Path(__file__).with_name("report.html.j2"),
        title=f"Mismatch of {Path(comparison.config.start.checkpoint).name}",
        headlines=_headlines(found),
        matrices=[_matrix(found, *figure) for figure in found.figures],
        trains=[NAMES[t] for t in comparison.train],
        rollouts=[NAMES[r] for r in comparison.rollout],
        images=images,
        flips=_flip_rows(found),
        facts=_facts(found),
    )
    return text_matrices(found)


def value(of: Cell, path: str) -> float:
    """Return a figure of a cell by its dotted path."""
    first, _, rest = path.partition(".")
    found = getattr(of, first)
    return float(found[rest] if rest else found)


def text_matrices(found: Found) -> str:
    """Format the matrices as text: a row per trainer dtype, a column per engine dtype."""
    lines = []
    for path, name, unit in found.figures:
        rollouts = found.comparison.rollout
        lines.append(f"\n{name} ({unit})")
        lines.append("  Megatron \\ vLLM" + "".join(f"{NAMES[r]:>12}" for r in rollouts))
        for t in found.comparison.train:
            values = "".join(f"{value(found.cells[t, r], path):>12.2e}" for r in rollouts)
            lines.append(f"  {NAMES[t]:15}{values}")
    return "\n".join(lines)


def as_json(found: Found) -> dict[str, Any]:
    """Return the raw figures and the settings that they were computed with."""
    comparison = found.comparison
    config = to_dict(comparison.config)
    checkpoint = Path(comparison.config.start.checkpoint).name
    return {
        "checkpoint": checkpoint,
        "model": config["model"],
        "parallel": config["parallel"],
        "temperature": comparison.config.rollout.temperature,
        "max_response_tokens": comparison.config.rollout.max_response_tokens,
        "num_prompts": comparison.num_prompts,
        "rollouts": comparison.rollouts,
        "took_s": comparison.took_s(),
        "samples": {
            rollout: {
                "responses": len(s.responses),
                "tokens": int(s.lengths.sum()),
                "truncated": int(s.truncated.sum()),
                **s.facts,
            }
            for rollout, s in found.samples.items()
        },
        "cells": [
            _finite(c.as_json() | {"score": found.score_facts[at]}) for at, c in found.cells.items()
        ],
    }


def _finite(item: Any) -> Any:
    if isinstance(item, dict):
        return {key: _finite(part) for key, part in item.items()}
    if isinstance(item, list):
        return [_finite(part) for part in item]
    return None if isinstance(item, float) and item != item else item


def _matrix(found: Found, path: str, name: str, unit: str) -> dict[str, Any]:
    rows = [
        (NAMES[t], [f"{value(found.cells[t, r], path):.3g}" for r in found.comparison.rollout])
        for t in found.comparison.train
    ]
    return {"name": name, "unit": unit, "rows": rows}


def _headlines(found: Found) -> list[tuple[str, str]]:
    """Divide BF16's figures by FP16's, where both sides have the same dtype."""
    pair = [found.cells.get((d, d)) for d in ("bf16", "fp16")]
    if pair[0] is None or pair[1] is None:
        return []
    rows = []
    for path, name, _ in FIGURES[:4]:
        low = value(pair[1], path)
        if low:
            rows.append((f"{value(pair[0], path) / low:.3g} ×", f"{name}, BF16 / FP16"))
    return rows


def _flip_rows(found: Found) -> list[tuple[str, ...]]:
    """Build the table of tokens by the number of layers that route them otherwise (MoE models)."""
    rows: list[tuple[str, ...]] = []
    for dtype in found.comparison.train:
        cell_ = found.cells.get((dtype, dtype))
        if cell_ is None:
            continue
        for part in cell_.by_router_flips:
            low, high = int(part.low) + 1, int(part.high)
            rows.append(
                (
                    NAMES[dtype],
                    str(high) if low == high else f"{low}–{high}",
                    f"{part.tokens:,}",
                    f"{part.abs_mean:.3g}",
                    f"{part.k3:.3g}",
                    f"{part.k3 * part.tokens / _k3_sum(cell_):.1%}",
                )
            )
    return rows


def _k3_sum(of: Cell) -> float:
    return sum(part.k3 * part.tokens for part in of.by_router_flips) or 1.0


def _facts(found: Found) -> list[tuple[str, str]]:
    comparison = found.comparison
    config = comparison.config
    some = next(iter(found.samples.values()))
    platform = some.facts["platform"]
    rows = [
        ("Checkpoint", Path(config.start.checkpoint).name),
        ("Model", f"{config.model.model_type}, {config.model.num_hidden_layers} layers, hidden "
                  f"{config.model.hidden_size}, vocabulary {config.model.vocab_size:,}"),
        ("Layout", f"{config.parallel.world_size} ranks; trainer TP {config.parallel.tp_size}, PP "
                   f"{config.parallel.pp_size}, EP {config.parallel.ep_size}; rollout TP "
                   f"{config.parallel.rollout_tp_size}"),
        ("Sampling", f"{comparison.num_prompts} prompts × {comparison.rollouts} responses of at "
                     f"most {config.rollout.max_response_tokens} tokens, temperature "
                     f"{config.rollout.temperature:g}, seed {config.seed}"),
        ("Device", str(platform["device"])),
        ("Native dtypes", ", ".join(platform["native_dtypes"])),
        ("16-bit products", str(platform.get("wide_products", "native"))),
        ("Versions", ", ".join(f"{k} {v}" for k, v in some.facts["versions"].items())),
    ]  # fmt: skip
    if took := comparison.took_s():
        rows.append(
            ("Took", f"{sum(took.values()) / 60:.1f} minutes, {len(took)} jobs one after the other")
        )
    for rollout, s in found.samples.items():
        rows.append(
            (f"vLLM in {NAMES[rollout]}",
             f"{len(s.responses)} responses, {int(s.lengths.sum()):,} tokens, "
             f"{int(s.truncated.sum())} truncated, {s.facts['tokens_per_s']:.0f} tokens/s")
        )  # fmt: skip
    return rows
