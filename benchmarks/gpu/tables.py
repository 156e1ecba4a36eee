"""What `benchmarks/gpu/run.py` found, as the tables of docs/results.md. No torch here."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.gpu.cases import CASES, Case
from benchmarks.gpu.experiments import agenda
from megatron_precision.config.overrides import config_from_dict
from megatron_precision.config.schema import RunConfig, to_dict
from megatron_precision.preflight import memory

Facts = dict[str, Any]
MISSING = "-"


def text(folder: Path) -> str:
    """Markdown of all results in a folder; a line says what is not there, and why.

    Raises:
        ValueError: for a file that is no JSON.
    """
    found = {
        path.stem: json.loads(path.read_text(encoding="utf-8")) for path in folder.glob("*.json")
    }
    devices = sorted({f["platform"]["device"] for f in found.values() if "platform" in f})
    parts = [
        f"Measured on: {', '.join(devices) or 'nothing yet'}.",
        _table("Training", TRAINING, _pairs("train", found)),
        _table("Share of a step's kernels (FP16)", None, _profiles(found)),
        _table("Engine", ENGINE, _pairs("engine", found)),
        _table("Mismatch at equal weights", MISMATCH, _pairs("engine", found)),
        _other_trainers(found),
        *_experiments(found),
        _absent(found),
    ]
    return "\n\n".join(part for part in parts if part)


# ---- pairs of precisions ------------------------------------------------------------------


def _pairs(kind: str, found: dict[str, Facts]) -> list[tuple[str, Facts, Facts]]:
    """Name, FP16's facts and BF16's, of every measure of a kind that has either; another
    precision is alone on FP16's side."""
    rows = []
    for case in CASES:
        if case.kind != kind or case.precision == "bf16":
            continue
        other = found.get(_sibling(case), {}) if case.precision == "fp16" else {}
        one = found.get(case.name, {})
        if one or other:
            label = case.name.removeprefix(f"{kind}-").replace(
                "-fp16", "", case.precision == "fp16"
            )
            rows.append((label, one, other))
    return rows


def _sibling(case: Case) -> str:
    return case.name.replace("fp16", "bf16")


def _number(facts: Facts, *path: str) -> float | None:
    value: Any = facts
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return None if isinstance(value, bool) or not isinstance(value, (int, float)) else float(value)


def _ratio(top: float | None, bottom: float | None) -> float | None:
    return top / bottom if top is not None and bottom else None


def _cell(value: float | None, form: str = ".3g") -> str:
    return MISSING if value is None else format(value, form)


def _both(one: Facts, two: Facts, get: Callable[[Facts], float | None], form: str) -> str:
    """FP16's and BF16's in one cell."""
    return f"{_cell(get(one), form)} / {_cell(get(two), form)}"


def _at(*path: str) -> Callable[[Facts], float | None]:
    return lambda facts: _number(facts, *path)


def recorded_config(facts: Facts) -> RunConfig | None:
    """The configuration of a measure; what is newer than its file has the default."""
    if "config" not in facts:
        return None
    return config_from_dict(_over(to_dict(RunConfig("recorded")), facts["config"]))


def _over(defaults: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    return defaults | {
        name: _over(defaults[name], value)
        if isinstance(value, dict) and isinstance(defaults.get(name), dict)
        else value
        for name, value in values.items()
    }


def _memory_share(facts: Facts) -> float | None:
    """Of the plan as it is now, which may be another than when it was measured."""
    config = recorded_config(facts)
    if config is None:
        return None
    return _ratio(_number(facts, "memory", "peak_allocated_bytes"), memory.of_trainer(config))


def _micro_batch(facts: Facts, _other: Facts) -> str:
    config = recorded_config(facts)
    return MISSING if config is None else f"{memory.micro_batch_tokens(config):,}"


def _against_copy(action: str) -> Callable[[Facts], float | None]:
    return lambda facts: _ratio(
        _number(facts, "sync", action, "median_s"), _number(facts, "sync", "copy", "median_s")
    )


Column = tuple[str, Callable[[Facts, Facts], str]]


def _shown(path: str, form: str) -> Callable[[Facts, Facts], str]:
    return lambda one, two: _both(one, two, _at(*path.split(".")), form)


def _quotient(path: str, form: str = ".3f") -> Callable[[Facts, Facts], str]:
    get = _at(*path.split("."))
    return lambda one, two: _cell(_ratio(get(one), get(two)), form)


TRAINING: tuple[Column, ...] = (
    ("tokens a micro-batch", _micro_batch),
    ("tokens/s, FP16 / BF16", _shown("tokens_per_s", ",.0f")),
    ("FP16 : BF16 (goal 0.97)", _quotient("tokens_per_s")),
    ("MFU (goal 45 %, dense)", _shown("mfu", ".1%")),
    ("memory : plan (goal 1 ± 0.1)", lambda a, b: _both(a, b, _memory_share, ".2f")),
    ("steps skipped", _shown("skipped_steps", ".0f")),
)
ENGINE: tuple[Column, ...] = (
    ("rollout tokens/s, FP16 / BF16", _shown("rollout.tokens_per_s", ",.0f")),
    ("FP16 : BF16", _quotient("rollout.tokens_per_s")),
    ("push : copy (goal 1.25)", lambda a, b: _both(a, b, _against_copy("push"), ".2f")),
    ("push and proof : copy", lambda a, b: _both(a, b, _against_copy("push_and_proof"), ".2f")),
    ("planning (s)", _shown("sync.plan_and_bind.median_s", ".2f")),
    ("sleep (s)", _shown("sleep.sleep_s", ".2f")),
    ("wake weights (s)", _shown("sleep.wake_weights_s", ".2f")),
    ("given back (bytes)", _shown("sleep.given_back_bytes", ".3g")),
)
MISMATCH: tuple[Column, ...] = (
    ("k3, FP16 / BF16", _shown("mismatch.mismatch/k3_kl", ".2e")),
    (
        "k3, BF16 : FP16",
        lambda one, two: _quotient("mismatch.mismatch/k3_kl", ".3g")(two, one),
    ),
    ("mean log-prob difference", _shown("mismatch.mismatch/abs_diff_mean", ".2e")),
    ("largest", _shown("mismatch.mismatch/abs_diff_max", ".2g")),
)


def _table(
    title: str, columns: Sequence[Column] | None, rows: Sequence[tuple[str, Facts, Facts]]
) -> str:
    if not rows:
        return ""
    if columns is None:  # a column a class of kernels
        names = list(dict.fromkeys(name for _, one, _ in rows for name in one))
        columns = [(name, _share(name)) for name in names]
    head = ["measure", *(name for name, _ in columns)]
    cells = ([label, *(get(one, two) for _, get in columns)] for label, one, two in rows)
    return _grid(title, head, cells)


def _share(name: str) -> Callable[[Facts, Facts], str]:
    def get(one: Facts, _other: Facts) -> str:
        return _cell(one.get(name), ".1%")

    return get


def _grid(title: str, head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join(
        [f"## {title}", "", _line(head), _line(["---"] * len(head)), *map(_line, rows)]
    )


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


# ---- profiles, experiments, what is not there ---------------------------------------------


def _profiles(found: dict[str, Facts]) -> list[tuple[str, Facts, Facts]]:
    rows: list[tuple[str, Facts, Facts]] = []
    for label, one, _ in _pairs("train", found):
        profile = one.get("profile")
        if profile:
            shares = {name: s / profile["busy_s"] for name, s in profile["by_class"].items()}
            busy = {"busy, of a step": profile["busy_s"] / one["step"]["median_s"]}
            rows.append((label, {**busy, **shares}, {}))
    return rows


def _other_trainers(found: dict[str, Facts]) -> str:
    """k3 of every trainer with the same responses; the first is the engine's own."""
    rows: dict[str, dict[str, Facts]] = {}
    for case in CASES:
        facts = found.get(case.name, {})
        if others := facts.get("other_trainers"):
            own = {"as the engine": facts["mismatch"]}
            rows[case.name.removeprefix("engine-")] = {**own, **others}
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    cells = (
        [label, *(_cell(_number(row.get(n, {}), "mismatch/k3_kl"), ".2e") for n in names)]
        for label, row in rows.items()
    )
    return _grid("Other trainers, the same responses", ["k3 of trainer", *names], cells)


def _experiments(found: dict[str, Facts]) -> list[str]:
    parts = []
    if "passed" in (tests := found.get("tests", {})):
        parts.append(
            f"## Tests of one GPU\n\n{tests['passed']} passed, {tests['failed']} failed, "
            f"{tests['skipped']} skipped in {tests['seconds']:.0f} s (goal: 300)."
        )
    if cells := found.get("mismatch-smollm2", {}).get("cells"):
        head = ["Megatron \\ vLLM", *dict.fromkeys(cell["rollout"] for cell in cells)]
        rows = {cell["train"]: [cell["train"]] for cell in cells}
        for cell in cells:
            rows[cell["train"]].append(_cell(cell["statistics"]["k3_kl"], ".2e"))
        parts.append(_grid("SmolLM2-135M: k3, nats a token", head, rows.values()))
    if figures := found.get("sanity-smollm2", {}).get("figures"):
        runs = [run["precision"] for run in found["sanity-smollm2"]["runs"]]
        lines = (
            [name, *map(_figure, figure["values"]), _figure(figure["ratio"])]
            for name, figure in figures.items()
        )
        title = "The sanity experiment on SmolLM2-135M"
        parts.append(_grid(title, ["figure", *runs, "ratio"], lines))
    return parts


def _figure(value: float | str | None) -> str:
    """A report's own number; what is not finite is a word there."""
    return value if isinstance(value, str) else _cell(value)


def _absent(found: dict[str, Facts]) -> str:
    lines = []
    for item in agenda(tiny=False):
        facts = found.get(item.name, {"error": "not measured"})
        why = facts.get("left_out") or facts.get("error")
        if why:
            lines.append(f"- `{item.name}`: {why}")
    return "\n".join(["## Not measured, or not to the end", "", *lines]) if lines else ""
