"""Writes the report of one or more runs: an HTML page, its PNGs and its numbers as JSON.

Everything on the page is computed from metrics.jsonl. This module imports neither torch nor an
engine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_precision.observe.metrics import finite
from megatron_precision.report import figures
from megatron_precision.report.findings import findings
from megatron_precision.report.html import save_image, write_page
from megatron_precision.report.plots import PLOTS, STYLE, Plot, draw
from megatron_precision.report.runs import (
    RunData,
    config_differences,
    load_runs,
    parameter_count,
    unexpected_differences,
)

_DPI = STYLE["savefig.dpi"]


def write_report(run_dirs: list[Path], out: Path) -> Path:
    """Write the report of one or more runs.

    Args:
        run_dirs: folders with a metrics.jsonl each, of finished or unfinished runs.
        out: the HTML file. Beside it come `<stem>.json` with the table's raw numbers and
            `<stem>_files/` with the plots as PNGs; the page needs neither.

    Returns:
        `out`.

    Raises:
        UserError: if a folder does not exist, a metrics file is damaged, or no run has any event.
    """
    runs = load_runs(run_dirs)
    table = figures.final_figures(runs)
    sentences = findings(table)
    files = out.parent / f"{out.stem}_files"
    files.mkdir(parents=True, exist_ok=True)
    write_page(
        out,
        Path(__file__).with_name("report.html.j2"),
        title=_title(runs),
        recipes=_recipes(runs),
        runs=runs,
        config=_first_config(runs),
        warnings=_warnings(runs),
        differences=_difference_rows(runs),
        headlines=_headlines(table),
        findings=sentences,
        facts=_facts(runs),
        plots=[_rendered(plot, runs, files) for plot in PLOTS],
        table=_table_rows(table),
        ratio_label=figures.ratio_label(table),
        notes=_notes(runs),
    )
    content = json.dumps(finite(_as_json(table, sentences)), indent=2, allow_nan=False)
    out.with_suffix(".json").write_text(content + "\n", encoding="utf-8")
    return out


def final_table(run_dirs: list[Path]) -> str:
    """Return the final figures of some runs as a text table with warnings, for the console.

    Raises:
        UserError: as `write_report` does.
    """
    runs = load_runs(run_dirs)
    warnings = [f"warning: {warning}" for warning in _warnings(runs)]
    return "\n".join([figures.text_table(figures.final_figures(runs)), *warnings])


def _title(runs: list[RunData]) -> str:
    labels = [run.label for run in runs]
    return " against ".join(labels) if len(labels) <= 2 else f"{len(labels)} runs"


def _recipes(runs: list[RunData]) -> str:
    return ", ".join(dict.fromkeys(run.config["recipe"] for run in runs if "recipe" in run.config))


def _first_config(runs: list[RunData]) -> dict[str, Any]:
    return next((run.config for run in runs if run.config), {})


def _warnings(runs: list[RunData]) -> list[str]:
    warnings = [f"{run.label}: {problem}." for run in runs for problem in run.problems]
    surprises = unexpected_differences(runs)
    if surprises:
        warnings.append(
            "The runs differ in more than precision, so what differs in the figures need not "
            f"come from precision: {', '.join(surprises)}."
        )
    lengths = {run.label: len(run.iterations) for run in runs}
    if len(set(lengths.values())) > 1:
        each = ", ".join(f"{label} {number}" for label, number in lengths.items())
        warnings.append(f"The runs are not equally long (iterations: {each}).")
    return warnings


def _difference_rows(runs: list[RunData]) -> list[tuple[str, list[str]]]:
    found = config_differences(runs) | unexpected_differences(runs)
    return [(path, [str(value) for value in values]) for path, values in found.items()]


def _headlines(table: figures.FinalTable) -> list[tuple[str, str]]:
    """Choose the few numbers at the top of the page: (number, its name)."""
    label = figures.ratio_label(table)
    found = [
        (figures.ratio_text(table.ratios[key]), f"{name}, {label}")
        for key, name in (
            ("k3", "k3 mismatch"),
            ("abs_diff_mean", "log-prob difference"),
            ("seq_log_ratio_std", "sequence log-ratio spread"),
        )
        if table.ratios[key] is not None
    ]
    for key, name in (
        ("final_reward", "final training reward"),
        ("skipped_steps", "skipped steps"),
        *(() if found else (("k3", "k3 mismatch, nats/token"),)),
    ):
        values = [table.value(key, n) for n in table.pair or range(len(table.runs))]
        if any(value is not None for value in values):
            text = " · ".join("-" if v is None else f"{v:.3g}" for v in values)
            found.append((text, name + (f", {label.replace(' / ', ' · ')}" if label else "")))
    return found


def _facts(runs: list[RunData]) -> list[tuple[str, list[str]]]:
    """List what was run: one value if all runs agree, else one per run with its label."""
    described = {run.label: _described(run) for run in runs if run.header}
    names = list(dict.fromkeys(name for facts in described.values() for name in facts))
    rows = []
    for name in names:
        values = {label: facts.get(name, "unknown") for label, facts in described.items()}
        if len(set(values.values())) == 1:
            rows.append((name, [next(iter(values.values()))]))
        else:
            rows.append((name, [f"{label}: {value}" for label, value in values.items()]))
    return rows


def _described(run: RunData) -> dict[str, str]:
    config = run.config
    train, parallel, rollout = (config.get(part, {}) for part in ("train", "parallel", "rollout"))
    return {
        "Recipe": str(config.get("recipe", "unknown")),
        "Model": _model_text(config.get("model", {})),
        "Task": _task_text(config.get("task", {})),
        "Algorithm": str(config.get("algo", {}).get("name", "unknown")),
        "Optimizer": _pairs(
            config.get("optimizer", {}), "learning_rate", "beta1", "beta2", "eps", "clip_grad"
        ),
        "Iteration": (
            f"{train.get('prompts_per_iteration', '?')} prompts × "
            f"{train.get('rollouts_per_prompt', '?')} rollouts, mini-batches of "
            f"{train.get('prompts_per_mini_batch', '?')} prompts, responses up to "
            f"{rollout.get('max_response_tokens', '?')} tokens"
        ),
        "Layout": (
            f"{run.header.get('rank_count', '?')} ranks; trainer "
            f"TP {parallel.get('tp_size', '?')}, PP {parallel.get('pp_size', '?')}, "
            f"EP {parallel.get('ep_size', '?')}; rollout TP {parallel.get('rollout_tp_size', '?')}"
        ),
        "Seed": str(config.get("seed", "unknown")),
        "Start": str(run.header.get("start_fingerprint", "unknown")),
        "Run": str(run.header.get("fingerprint", "unknown")),
        "Status": f"{run.status}, {len(run.iterations)} iterations",
        "Device": str(run.header.get("platform", {}).get("device", "unknown")),
        "dtypes, read back": _pairs(run.header.get("dtypes", {})) or "unknown",
        "Native dtypes": _text(run.header.get("platform", {}).get("native_dtypes", "unknown")),
        "Versions": _pairs(run.header.get("versions", {})) or "unknown",
    }


def _model_text(model: dict[str, Any]) -> str:
    if not model:
        return "unknown"
    text = (
        f"{model.get('model_type', '?')}, {model.get('num_hidden_layers', '?')} layers, hidden "
        f"{model.get('hidden_size', '?')}, {model.get('num_attention_heads', '?')} heads "
        f"({model.get('num_key_value_heads', '?')} key/value)"
    )
    if model.get("num_experts"):
        text += f", {model['num_experts']} experts, top {model.get('num_experts_per_tok', '?')}"
    try:
        count = parameter_count(model)
    except KeyError as missing:
        return f"{text}; size unknown, the config has no {missing}"
    return f"{text}; {count:,} parameters"


def _task_text(task: dict[str, Any]) -> str:
    if not task:
        return "unknown"
    return (
        f"{task.get('name', '?')}, difficulty {task.get('difficulty', '?')}; "
        f"{task.get('eval_questions', '?')} held-out questions"
    )


def _pairs(values: dict[str, Any], *names: str) -> str:
    chosen = [(name, values[name]) for name in (names or values) if name in values]
    return ", ".join(f"{name.replace('_', ' ')} {_text(value)}" for name, value in chosen)


def _text(value: Any) -> str:
    return ", ".join(str(v) for v in value) if isinstance(value, (list, tuple)) else str(value)


def _notes(runs: list[RunData]) -> list[str]:
    """Quote each distinct note of the runs on 16-bit matrix products, with the runs' labels."""
    found: dict[str, list[str]] = {}
    for run in runs:
        note = run.header.get("platform", {}).get("wide_products")
        if note:
            found.setdefault(str(note).rstrip("."), []).append(run.label)
    return [
        f"16-bit matrix products on this platform ({', '.join(labels)}): {note}."
        for note, labels in found.items()
    ]


def _rendered(plot: Plot, runs: list[RunData], files: Path) -> dict[str, Any]:
    """Draw a plot for the template; `image` is "" if no run has its data."""
    figure = draw(plot, runs)
    target = files / f"{plot.name}.png"
    image = ""
    if figure is None:
        target.unlink(missing_ok=True)  # a picture of an earlier report must not stay behind
    else:
        image = save_image(figure, target, _DPI)
    return {
        "name": plot.name,
        "title": plot.title,
        "caption": plot.caption,
        "wide": plot.wide,
        "image": image,
    }


def _table_rows(table: figures.FinalTable) -> list[dict[str, Any]]:
    return [
        {
            "label": figure.label,
            "unit": figure.unit,
            "how": figure.how,
            "cells": [figures.number_text(value) for value in table.values[figure.key]],
            "ratio": figures.ratio_text(table.ratios[figure.key]),
        }
        for figure in figures.FIGURES
        if any(value is not None for value in table.values[figure.key])
    ]


def _as_json(table: figures.FinalTable, sentences: list[str]) -> dict[str, Any]:
    pair = [table.runs[number].label for number in table.pair] if table.pair else None
    return {
        "runs": [
            {
                "label": run.label,
                "folder": run.path.resolve().name,
                "precision": run.policy,
                "fingerprint": run.header.get("fingerprint"),
                "start_fingerprint": run.header.get("start_fingerprint"),
                "status": run.status,
                "iterations": len(run.iterations),
                "problems": run.problems,
            }
            for run in table.runs
        ],
        "ratio_of": pair,
        "figures": {
            figure.key: {
                "unit": figure.unit,
                "metric": figure.metric,
                "how": figure.how,
                "values": table.values[figure.key],
                "ratio": table.ratios[figure.key],
            }
            for figure in figures.FIGURES
        },
        "differences": dict(_difference_rows(table.runs)),
        "findings": sentences,
    }
