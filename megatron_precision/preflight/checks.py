"""Gathers all figures of a plan for one configuration, as values and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from megatron_precision.config.schema import ParallelConfig, RunConfig
from megatron_precision.layouts.megatron import padded_vocab_size
from megatron_precision.layouts.vllm import padded_vocab_rows
from megatron_precision.preflight import estimate, memory, search, wire, work


@dataclass(frozen=True)
class Case:
    """The work and the time of an iteration whose sequences have certain lengths."""

    lengths: work.Lengths
    work: work.Work
    estimate: estimate.Estimate


@dataclass(frozen=True)
class Preflight:
    """All figures of a plan for a valid configuration.

    Attributes:
        verdict: whether the configuration fits.
        ranks_per_node: number of ranks on a full node.
        stages: memory of a rank of each pipeline stage.
        moved: bytes that one weight sync moves.
        rates: the rates that the estimate assumes.
        sampled_per_kept: groups sampled for each group that is trained on.
        cases: the estimates, by the names `mean` and `limit`.
    """

    verdict: search.Verdict
    ranks_per_node: int
    stages: list[memory.Memory]
    moved: wire.SyncBytes
    rates: estimate.Rates
    sampled_per_kept: float
    cases: dict[str, Case]

    @property
    def config(self) -> RunConfig:
        """The configuration that the plan is for."""
        return self.verdict.config

    @property
    def fullest(self) -> int:
        """The pipeline stage whose ranks need most memory."""
        return max(range(len(self.stages)), key=lambda stage: self.stages[stage].total)

    @property
    def nodes(self) -> int:
        """The number of nodes of the job."""
        return -(-self.config.parallel.world_size // self.ranks_per_node)

    def values(self) -> dict[str, Any]:
        """Return all figures as values for JSON, in bytes, seconds and operations."""
        config, found = self.config, self.verdict.found
        return {
            **figures(self.verdict),
            "nodes": self.nodes,
            "vocabulary_rows": vocabulary_rows(config),
            "phases": memory.totals(config, found),
            "states": memory.states(config),
            "stages": [dataclasses.asdict(s) | {"total": s.total} for s in self.stages],
            "host_bytes": {
                "moved": memory.host_bytes(config, self.fullest),
                "dumps": memory.dump_copy_bytes(config, found, self.moved.weights),
            },
            "sync": dataclasses.asdict(self.moved),
            "rates": dataclasses.asdict(self.rates),
            "sampled_per_kept": self.sampled_per_kept,
            "cases": {
                name: {
                    "lengths": dataclasses.asdict(case.lengths),
                    "work": dataclasses.asdict(case.work) | {"flops": case.work.flops},
                    "estimate": dataclasses.asdict(case.estimate)
                    | {"iteration_s": case.estimate.iteration_s},
                }
                for name, case in self.cases.items()
            },
            "notes": list(notes(config, self.ranks_per_node)),
        }


def of_run(
    verdict: search.Verdict,
    ranks_per_node: int,
    rates: estimate.Rates,
    lengths: dict[str, work.Lengths],
    sampled_per_kept: float,
) -> Preflight:
    """Compute all figures of a plan for a valid configuration; arguments as in `Preflight`.

    Args:
        lengths: mean lengths of each case, by its name.
    """
    config = verdict.config
    per_node = min(ranks_per_node, config.parallel.world_size)
    moved = wire.of_run(config, per_node)
    cases = {}
    for name, chosen in lengths.items():
        done = work.of_iteration(config, chosen, sampled_per_kept)
        time = estimate.of_iteration(config, chosen, done, moved, rates, per_node)
        cases[name] = Case(chosen, done, time)
    stages = [memory.of_stage(config, stage) for stage in range(config.parallel.pp_size)]
    return Preflight(verdict, per_node, stages, moved, rates, sampled_per_kept, cases)


def figures(verdict: search.Verdict) -> dict[str, Any]:
    """Return memory and verdict as values for JSON."""
    config, found = verdict.config, verdict.found
    return {
        "recipe": config.recipe,
        "precision": config.precision,
        "gpu_gb": verdict.gpu_gb,
        "parallel": dataclasses.asdict(config.parallel),
        "bytes": dataclasses.asdict(found) | {"total": found.total},
        "needed": verdict.needed,
        "kv_sequences": round(memory.kv_sequences(config), 2),
        "fits": verdict.fits,
    }


def vocabulary_rows(config: RunConfig) -> dict[str, int]:
    """Return the rows of the vocabulary: the model's, and padded by the trainer and the engines."""
    rows = config.model.vocab_size
    return {
        "model": rows,
        "trainer": padded_vocab_size(rows, config.parallel.tp_size),
        "engines": padded_vocab_rows(config.model),
    }


def notes(config: RunConfig, ranks_per_node: int) -> Iterator[str]:
    """Yield a note for everything in a valid layout that costs speed."""
    layout, train = config.parallel, config.train
    for name, size in (
        ("the trainer's TP", layout.tp_size),
        ("rollout TP", layout.rollout_tp_size),
    ):
        if layout.world_size > ranks_per_node and ranks_per_node % size:
            yield f"{name} {size} spans nodes of {ranks_per_node}, and so do its collectives"
    prompts, replicas = train.prompts_per_iteration, layout.rollout_replicas
    if prompts < replicas:
        yield f"{replicas - prompts} of {replicas} engines get no prompt of the {prompts}"
    elif prompts % replicas:
        yield f"{prompts} prompts over {replicas} engines: some get one more than others"
    sequences = train.prompts_per_mini_batch * train.rollouts_per_prompt // layout.dp_size
    if layout.pp_size > 1 and sequences < 4 * layout.pp_size:
        yield (
            f"a pipeline of {layout.pp_size} stages is badly filled by {sequences} sequences "
            "a rank and step"
        )


def short(layout: ParallelConfig) -> str:
    """Describe a layout in a few words, without sizes of 1."""
    sizes = {"TP": layout.tp_size, "PP": layout.pp_size, "EP": layout.ep_size}
    sizes |= {"ETP": layout.etp_size, "DP": layout.dp_size}
    words = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    return " ".join([*words, f"rollout TP {layout.rollout_tp_size}"])
