"""`python -m megatron_precision plan`: the memory of a recipe's ranks, and whether it fits."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from megatron_precision.config import RunConfig
from megatron_precision.errors import UserError
from megatron_precision.planning import memory, search
from megatron_precision.planning.search import GB, Verdict

_COLUMNS = (
    "parameters", "gradients", "optimizer", "activations", "logits", "engine_weights", "kv_cache",
    "engine_workspace", "sync_buffers", "reserve",
)  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The command's own arguments, beside those that choose a configuration."""
    parser.add_argument(
        "--all-sizes", action="store_true", help="a table of every size that the recipe is for"
    )
    parser.add_argument("--json", action="store_true", help="print the raw figures")


def run(config: RunConfig, gpu_gb: int, as_json: bool) -> int:
    """Print one configuration's memory by pipeline stage.

    Raises:
        UserError: where it does not fit, after the figures are printed.
    """
    verdict = search.judge(config, gpu_gb)
    stages = [memory.of_stage(config, stage) for stage in range(config.parallel.pp_size)]
    if as_json:
        print(json.dumps(_figures(verdict), indent=2))
    else:
        _print_stages(config, stages)
        held = memory.kv_sequences(config)
        tokens = config.max_sequence_tokens
        print(f"\nthe KV cache of an engine holds {held:.1f} sequences of {tokens:,} tokens")
    if not verdict.fits:
        raise UserError(search.refusal(verdict))
    if not as_json:
        print(f"fits: {verdict.found.total / GB:.1f} of {gpu_gb} GB on the fullest rank")
    return 0


def print_sizes(verdicts: list[tuple[str, Verdict | None, str]], as_json: bool) -> None:
    """A row a size, as Markdown.

    Args:
        verdicts: (size, verdict, refusal): no verdict where the recipe has no layout.
    """
    if as_json:
        rows = [
            {"size": size, **(_figures(verdict) if verdict else {"refused": why})}
            for size, verdict, why in verdicts
        ]
        print(json.dumps(rows, indent=2))
        return
    titles = [name.replace("_", " ") for name in _COLUMNS]
    print("| GPUs | layout | " + " | ".join(titles) + " | total, GB a rank | |")
    print("|---" * (len(_COLUMNS) + 4) + "|")
    refusals = []
    for size, verdict, why in verdicts:
        if verdict is None:
            print(f"| {size} | - |" + " - |" * (len(_COLUMNS) + 1) + " does not fit |")
        else:
            values = [f"{getattr(verdict.found, name) / GB:.1f}" for name in _COLUMNS]
            total = f"{verdict.found.total / GB:.1f}"
            fits = "fits" if verdict.fits else "does not fit"
            layout = _short(verdict.config)
            print(f"| {size} | {layout} | " + " | ".join(values) + f" | {total} | {fits} |")
        if why:
            refusals.append(why)
    for why in refusals:
        print(f"\n{why}")


def _print_stages(config: RunConfig, stages: list[memory.Memory]) -> None:
    print(
        f"{config.recipe}, {config.precision}, {config.parallel.world_size} GPUs: {_short(config)}"
    )
    for number, found in enumerate(stages):
        held = memory.trainer_elements(config, number)
        print(
            f"\nstage {number}: {held.dense:,} dense and {held.expert:,} expert parameters a rank; "
            f"{memory.engine_elements(config):,} in the engine"
        )
        for part in dataclasses.fields(found):
            print(f"  {part.name.replace('_', ' '):<18}{getattr(found, part.name) / GB:8.2f} GB")
        print(f"  {'total':<18}{found.total / GB:8.2f} GB")


def _short(config: RunConfig) -> str:
    layout = config.parallel
    sizes = {"TP": layout.tp_size, "PP": layout.pp_size, "EP": layout.ep_size}
    sizes |= {"ETP": layout.etp_size, "DP": layout.dp_size}
    words = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    return " ".join([*words, f"rollout TP {layout.rollout_tp_size}"])


def _figures(verdict: Verdict) -> dict[str, Any]:
    config, found = verdict.config, verdict.found
    return {
        "recipe": config.recipe,
        "precision": config.precision,
        "gpu_gb": verdict.gpu_gb,
        "parallel": dataclasses.asdict(config.parallel),
        "bytes": dataclasses.asdict(found) | {"total": found.total},
        "kv_sequences": round(memory.kv_sequences(config), 2),
        "fits": verdict.fits,
    }
