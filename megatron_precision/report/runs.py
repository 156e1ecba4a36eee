"""What the report knows of a run: its events by kind, its label and colour, what it ran.

Reads metrics.jsonl and nothing else, so that a report can be made anywhere, of any run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_precision.config.errors import Problem, UserError
from megatron_precision.observe.metrics import parse_metrics

# One colour a policy, the same in every figure; told apart by people who see colours differently.
POLICY_COLOURS = {
    "bf16": "#c8553d",
    "fp16": "#2a6f97",
    "fp32": "#5b7553",
    "bf16/fp16": "#b08968",
    "bf16/fp32": "#9d8420",
    "fp16/bf16": "#7b5ea7",
}
_OTHER_COLOURS = ("#444444", "#8d6b94", "#3d8f8a", "#a23b72", "#7a7a35")
# A second run of the same policy keeps the colour's family by being lighter.
_LIGHTEN = (0.0, 0.35, 0.6, 0.75)


@dataclass(frozen=True)
class RunData:
    """A run, as its metrics file tells it.

    Attributes:
        path: the run's folder.
        label: the policy's name in capitals (`BF16`, `BF16 train, FP16 rollout`), with the
            folder where two runs share a policy.
        policy: the precision policy's name; "" where the file does not say.
        colour: of this run in every figure.
        header: the `run` event; empty where the run did not get that far.
        steps, iterations, evals: events of these kinds, oldest first.
        end: the `end` event; empty where there is none.
        problems: sentences on what is missing or broken; empty for a run that completed.
    """

    path: Path
    label: str
    policy: str
    colour: str
    header: dict[str, Any] = field(default_factory=dict)
    steps: list[dict[str, Any]] = field(default_factory=list)
    iterations: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    end: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def config(self) -> dict[str, Any]:
        """The run's config as nested dicts; empty if unknown."""
        return dict(self.header.get("config", {}))

    @property
    def status(self) -> str:
        """`completed`, `stopped`, `failed`, or `unfinished` if the file has no end event."""
        return str(self.end.get("status", "unfinished"))

    @property
    def loss_scaling(self) -> bool:
        """True if the trainer scales its loss: the policy trains in FP16."""
        return self.policy.partition("/")[0] == "fp16"


def load_runs(run_dirs: list[Path]) -> list[RunData]:
    """Read runs, name them and give them colours.

    A folder without metrics is a run with no data, which the report says; it is kept.

    Raises:
        UserError: where folders do not exist, no run at all has an event, or a file is damaged.
    """
    missing = [path for path in run_dirs if not path.is_dir()]
    if missing:
        raise UserError(
            Problem("not a run", str(path), "no such folder", "the folder of a run")
            for path in missing
        )
    events = [_events(path) for path in run_dirs]
    if not any(found for found, _ in events):
        raise UserError(
            Problem(
                what="nothing to report",
                where=", ".join(str(path / "metrics.jsonl") for path in run_dirs),
                got="no events",
                expected="at least one run with a `run` event",
            )
        )
    policies = [_policy(found) for found, _ in events]
    names = _folder_names(run_dirs)
    runs = []
    for number, (path, (found, problems)) in enumerate(zip(run_dirs, events, strict=True)):
        policy = policies[number]
        label = _policy_label(policy) or names[number]
        if policy and policies.count(policy) > 1:
            label = f"{label} ({names[number]})"
        run = RunData(
            path=path,
            label=label,
            policy=policy,
            colour=_colour(policies, number),
            header=next((event for event in found if event["event"] == "run"), {}),
            steps=[event for event in found if event["event"] == "step"],
            iterations=[event for event in found if event["event"] == "iteration"],
            evals=[event for event in found if event["event"] == "eval"],
            end=next((event for event in reversed(found) if event["event"] == "end"), {}),
            problems=problems,
        )
        run.problems.extend(_shortcomings(run))
        runs.append(run)
    return runs


def series(events: list[dict[str, Any]], name: str, axis: str) -> tuple[list[int], list[float]]:
    """Return a metric's points: (`iteration` or `step` of each event that has it, values)."""
    points = [(event[axis], event[name]) for event in events if name in event]
    return [x for x, _ in points], [float(y) for _, y in points]


def config_differences(runs: list[RunData]) -> dict[str, list[Any]]:
    """Return the settings that differ between runs, with each run's value.

    `precision` is among the paths. Runs without a config are left out.
    """
    flat = [flatten(run.config) for run in runs if run.config]
    paths = sorted({path for config in flat for path in config})
    found = {path: [config.get(path, "(absent)") for config in flat] for path in paths}
    return {path: values for path, values in found.items() if any(v != values[0] for v in values)}


def unexpected_differences(runs: list[RunData]) -> dict[str, list[Any]]:
    """List what differs between runs besides `precision`: settings, start, ranks, versions.

    `dtypes` is what the audit read back of the precision; between runs of one precision
    it must not differ.
    """
    found = {path: v for path, v in config_differences(runs).items() if path != "precision"}
    known = [run for run in runs if run.header]
    for name in ("start_fingerprint", "rank_count", "platform", "dtypes", "versions"):
        flat = [flatten({name: run.header.get(name, "(absent)")}) for run in known]
        for path in sorted({path for values in flat for path in values}):
            values = [part.get(path, "(absent)") for part in flat]
            if any(value != values[0] for value in values):
                found[path] = values
    if len({run.policy for run in known}) > 1:
        found = {path: v for path, v in found.items() if not path.startswith("dtypes.")}
    return found


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten a nested dict to dotted paths: {"train": {"seed": 4}} to {"train.seed": 4}."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def parameter_count(model: Mapping[str, Any]) -> int:
    """Count a Qwen3 model's parameters by its config, without padding of the vocabulary.

    Counted: embedding and output projection, per layer the four attention projections, query and
    key norms, two layer norms, and the gated MLP or the experts with their router; the last norm.

    Raises:
        KeyError: where the config lacks a field.
    """
    hidden, head = model["hidden_size"], model["head_dim"]
    queries = model["num_attention_heads"] * head
    keys = model["num_key_value_heads"] * head
    attention = hidden * (2 * queries + 2 * keys) + 2 * head
    if model["num_experts"]:
        mlp = model["num_experts"] * hidden * (3 * model["moe_intermediate_size"] + 1)
    else:
        mlp = 3 * hidden * model["intermediate_size"]
    embeddings = model["vocab_size"] * hidden * (1 if model["tie_word_embeddings"] else 2)
    return int(embeddings + model["num_hidden_layers"] * (attention + mlp + 2 * hidden) + hidden)


def _events(run_dir: Path) -> tuple[list[dict[str, Any]], list[str]]:
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return [], ["it has no metrics.jsonl"]
    content = parse_metrics(path)
    if content.truncated_tail:
        return content.events, ["the last line of its metrics.jsonl is cut and was left out"]
    return content.events, []


def _shortcomings(run: RunData) -> list[str]:
    problems = []
    if not run.header:
        problems.append("it has no `run` event, so its config is unknown")
    if not run.iterations:
        problems.append("it finished no iteration, so it has no curves")
    planned = run.config.get("train", {}).get("iterations")
    of_planned = f" of {planned}" if planned else ""
    if run.status == "failed":
        error = run.end.get("error") or "no error text"
        problems.append(f"it failed after {len(run.iterations)}{of_planned} iterations: {error}")
    elif run.status == "stopped":
        stopped = run.end.get("error")
        problems.append(f"it was stopped after {len(run.iterations)}{of_planned}: {stopped}")
    elif not run.end:
        problems.append(
            f"it has no `end` event: it was killed, or is still running, after "
            f"{len(run.iterations)}{of_planned} iterations"
        )
    return problems


def _policy(events: list[dict[str, Any]]) -> str:
    header = next((event for event in events if event["event"] == "run"), {})
    return str(header.get("config", {}).get("precision", ""))


def _policy_label(policy: str) -> str:
    train, _, rollout = policy.upper().partition("/")
    return f"{train} train, {rollout} rollout" if rollout else train


def _folder_names(run_dirs: list[Path]) -> list[str]:
    """Return the last part of each path, or the last two if the last ones are not distinct."""
    names = [path.resolve().name for path in run_dirs]
    if len(set(names)) == len(names):
        return names
    return ["/".join(path.resolve().parts[-2:]) for path in run_dirs]


def _colour(policies: list[str], number: int) -> str:
    policy = policies[number]
    earlier = policies[:number]
    if policy in POLICY_COLOURS:
        share = _LIGHTEN[min(earlier.count(policy), len(_LIGHTEN) - 1)]
        return _lighter(POLICY_COLOURS[policy], share)
    others = sum(1 for name in earlier if name not in POLICY_COLOURS)
    return _OTHER_COLOURS[others % len(_OTHER_COLOURS)]


def _lighter(colour: str, share: float) -> str:
    """Move a colour towards white by a share of the way; `#rrggbb` in and out."""
    parts = [int(colour[at : at + 2], 16) for at in (1, 3, 5)]
    return "#" + "".join(f"{math.floor(p + (255 - p) * share):02x}" for p in parts)
