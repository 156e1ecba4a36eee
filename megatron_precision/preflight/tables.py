"""Prints a plan for a terminal of 100 columns, and the table of all sizes as Markdown."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator

from megatron_precision.preflight import estimate, memory
from megatron_precision.preflight.checks import Preflight, notes, short, vocabulary_rows
from megatron_precision.preflight.search import GB, Verdict

_WIDTH = 98
_COLUMNS = (
    "parameters", "gradients", "optimizer", "activations", "logits", "engine_weights", "kv_cache",
    "engine_workspace", "sync_buffers", "reserve",
)  # fmt: skip


def lines(found: Preflight) -> Iterator[str]:
    """Yield the lines of a plan, without the verdict."""
    yield from _layout(found)
    yield ""
    yield from _memory(found)
    yield ""
    yield from _sync(found)
    yield ""
    yield from _iteration(found)
    yield ""
    yield from _wrapped("assumed: " + "; ".join(_assumptions(found)) + ".")


def _layout(found: Preflight) -> Iterator[str]:
    config, layout = found.config, found.config.parallel
    rows = vocabulary_rows(config)
    train = config.train
    sequences = train.prompts_per_mini_batch * train.rollouts_per_prompt
    nodes = f"{found.nodes} node{'s' * (found.nodes > 1)} of {found.ranks_per_node}"
    gpus = f"{layout.world_size:,} GPUs of {found.verdict.gpu_gb} GB ({nodes})"
    yield f"{config.recipe}, {config.precision}: {gpus}, {short(layout)}"
    yield ""
    yield (
        f"  trainer      {layout.dp_size} replica{'s' * (layout.dp_size > 1)} of "
        f"{layout.tp_size * layout.pp_size} ranks; {train.steps_per_iteration} steps of "
        f"{sequences:,} sequences, {sequences // layout.dp_size:,} a replica"
    )
    yield (
        f"  engines      {layout.rollout_replicas} replica{'s' * (layout.rollout_replicas > 1)} of "
        f"{layout.rollout_tp_size} ranks; a KV cache holds {memory.kv_sequences(config):.1f} "
        f"sequences of {config.max_sequence_tokens:,} tokens"
    )
    yield (
        f"  vocabulary   {rows['model']:,} rows; padded to {rows['trainer']:,} in the trainer, "
        f"{rows['engines']:,} in the engines"
    )
    for note in notes(config, found.ranks_per_node):
        yield f"  note         {note}"


def _memory(found: Preflight) -> Iterator[str]:
    config, stage = found.config, found.fullest
    rank = found.stages[stage]
    states = memory.states(config)
    yield f"{f'memory of a rank of stage {stage}, GB':<40}" + "".join(
        f"{phase:>16}" for phase in memory.PHASES
    )
    for part in dataclasses.fields(rank):
        size = f"{getattr(rank, part.name) / GB:.2f}"
        cells = (f"{size} {states[part.name][phase]:<5}" for phase in memory.PHASES)
        yield f"  {part.name.replace('_', ' '):<38}" + "".join(f"{cell:>16}" for cell in cells)
    totals = memory.totals(config, rank)
    yield f"  {'allocated at most':<38}" + "".join(
        f"{totals[phase] / GB:>10.2f}      " for phase in memory.PHASES
    )
    yield f"  {'what has to fit':<38}{memory.needed(config, rank) / GB:>10.2f}"
    yield from _wrapped(memory.says(config), "  ")
    moved = memory.host_bytes(config, stage)
    if moved:
        yield f"  {'host memory, for what is moved there':<38}{moved / GB:>10.2f}"
    copy = memory.dump_copy_bytes(config, rank, found.moved.weights)
    if copy:
        yield f"  {'host memory, for dumps':<38}{copy / GB:>10.2f}"
    for number, other in enumerate(found.stages if len(found.stages) > 1 else []):
        held = memory.trainer_elements(config, number)
        yield (
            f"  stage {number:<3} {held.dense:>15,} dense {held.expert:>15,} expert parameters "
            f"{memory.needed(config, other) / GB:>9.2f} GB"
        )


def _sync(found: Preflight) -> Iterator[str]:
    moved = found.moved
    bound = "" if moved.exact else ", at most (main copies lie wherever their ranges fall)"
    yield f"{f'weight sync, GB{bound}':<40}"
    nic = moved.node_network / found.ranks_per_node
    for title, size in (
        ("weights of the model", moved.weights),
        ("copied inside ranks, all ranks", moved.copied),
        ("received in messages, all ranks", moved.received),
        ("  of it between nodes", moved.network),
        ("by the busiest rank over NVLink", max(0, moved.rank_received - nic)),
        ("  over its NIC", nic),
        ("into the busiest node", moved.node_network),
    ):
        yield f"  {title:<38}{size / GB:>10,.2f}"


def _iteration(found: Preflight) -> Iterator[str]:
    cases = list(found.cases.values())
    titles = {"mean": "mean lengths", "limit": "at the limits"}
    yield f"{'an iteration, estimated':<40}" + "".join(
        f"{titles[name]:>20}" for name in found.cases
    )

    def row(title: str, cells: list[str]) -> str:
        return f"  {title:<38}" + "".join(f"{cell:>20}" for cell in cells)

    def estimates(title: str, name: str) -> str:
        return row(title, [_time(getattr(case.estimate, name)) for case in cases])

    yield row(
        "tokens of prompt + response",
        [f"{c.lengths.prompt:,.0f} + {c.lengths.response:,.0f}" for c in cases],
    )
    yield row("sequences sampled", [f"{c.work.sampled_sequences:,}" for c in cases])
    yield row("sequences trained on", [f"{c.work.trained_sequences:,}" for c in cases])
    yield row("tokens sampled", [_large(c.work.sampled_tokens) for c in cases])
    yield row("tokens trained on", [_large(c.work.trained_tokens) for c in cases])
    for title, name in (
        ("operations: prefill", "prefill_flops"),
        ("  decoding", "decode_flops"),
        ("  old log-probs", "old_logprobs_flops"),
        ("  training, forward and backward", "training_flops"),
        ("  layers run again", "recomputed_flops"),
    ):
        yield row(title, [f"{getattr(c.work, name):.2e}" for c in cases])
    yield row("sequences decoded at once, a replica", [f"{c.estimate.decoding:,}" for c in cases])
    gpus = found.config.parallel.world_size
    yield row(
        "tokens a second and GPU, in the rollout",
        [f"{c.estimate.rollout_tokens_per_s / gpus:,.0f}" for c in cases],
    )
    yield estimates("rollout", "rollout_s")
    yield estimates("old log-probs", "old_logprobs_s")
    yield estimates("training", "training_s")
    yield estimates("gradients, parameters over DP", "exchange_s")
    yield estimates("weight sync", "sync_s")
    yield estimates("iteration", "iteration_s")
    yield row("GPU hours an iteration", [f"{c.estimate.gpu_hours:,.2f}" for c in cases])
    count = found.config.train.iterations
    yield row(
        f"GPU hours of {count} iterations",
        [f"{count * c.estimate.gpu_hours:,.0f}" for c in cases],
    )


def _assumptions(found: Preflight) -> Iterator[str]:
    rates: estimate.Rates = found.rates
    mean = found.cases["mean"].estimate
    yield (
        f"{rates.flops / 1e12:g} TFLOP/s a GPU, of which passes reach {rates.mfu:.0%} (--tflops, "
        "--mfu; recomputation is counted as work)"
    )
    yield (
        f"decoding reads {rates.hbm / 1e12:g} TB/s × {rates.hbm_share:.0%} (--hbm, --hbm-share) "
        f"and launches a layer in {rates.layer_launch_s * 1e6:g} µs (--launch-us; "
        "kernels.cuda_graphs takes 0)"
    )
    yield (
        f"{mean.decoding:,} sequences at once are bound by {mean.decoding_limit}"
        + (", and the rollout by its longest response alone" if mean.longest_alone else "")
    )
    yield (
        f"NVLink {rates.nvlink / 1e9:g} and NIC {rates.nic / 1e9:g} GB/s a rank, one way "
        "(--nvlink, --nic), nothing overlapped"
    )
    yield (
        "all sequences have the column's lengths (--mean-prompt, --mean-response; a quarter of the "
        "limits by default)"
    )
    yield f"groups sampled for one kept: {found.sampled_per_kept:g} (--sampled-per-kept)"
    yield (
        "not counted: evaluation, grading, the start, checkpoints, padding, an uneven router; no "
        "run's time was measured on GPUs"
    )


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(text, _WIDTH, initial_indent=indent, subsequent_indent=indent + "  ")


def _large(number: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6)):
        if number >= size:
            return f"{number / size:,.1f} {unit}"
    return f"{number:,.0f}"


def _time(seconds: float) -> str:
    if seconds >= 5400:
        return f"{seconds / 3600:,.1f} h"
    if seconds >= 90:
        return f"{seconds / 60:,.1f} min"
    return f"{seconds:.2f} s" if seconds >= 0.1 or seconds == 0 else f"{seconds * 1e3:.2f} ms"


def sizes(verdicts: list[tuple[str, Verdict | None, str]]) -> Iterator[str]:
    """Yield a Markdown table with a row for each size, and then why sizes are refused.

    Args:
        verdicts: size, verdict and refusal; the verdict is None if the recipe has no layout.
    """
    titles = [name.replace("_", " ") for name in _COLUMNS]
    yield "| GPUs | layout | " + " | ".join(titles) + " | total, GB a rank | |"
    yield "|---" * (len(_COLUMNS) + 4) + "|"
    for size, verdict, _ in verdicts:
        if verdict is None:
            yield f"| {size} | - |" + " - |" * (len(_COLUMNS) + 1) + " does not fit |"
        else:
            values = [f"{getattr(verdict.found, name) / GB:.1f}" for name in _COLUMNS]
            total = f"{verdict.found.total / GB:.1f}"
            fits = "fits" if verdict.fits else "does not fit"
            layout = short(verdict.config.parallel)
            yield f"| {size} | {layout} | " + " | ".join(values) + f" | {total} | {fits} |"
    for _, _, why in verdicts:
        if why:
            yield f"\n{why}"
