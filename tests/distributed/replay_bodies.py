"""What the ranks do in tests of dumps and replays. Each public function runs on every rank."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_precision.actor.actor import Actor
from megatron_precision.data.tasks import Task
from megatron_precision.replay import scoring
from megatron_precision.rollout.engine import Request, Rollout
from megatron_precision.train.dumps import Dumper, Measured
from megatron_precision.train.rollouts import RolloutGroups
from tests.distributed.actor_bodies import make_actor
from tests.distributed.cases import Case


def compared(cases: dict[str, tuple[Case, dict[str, torch.Tensor], str]]) -> dict[str, Any]:
    """For each (case, weights of the subject, its precision): what `scoring` finds."""
    results = {}
    for name, (case, weights, precision) in cases.items():
        reference = make_actor(dataclasses.replace(case.config, precision="fp32"), case.tensors)
        config = dataclasses.replace(case.config, precision=precision)
        subject = Actor(config, config.optimizer, config.loss_scale)
        subject.weights.load(weights)
        rows = list(torch.arange(len(case.batch)).chunk(2))
        layers = config.model.num_hidden_layers
        results[name] = scoring.compare_passes(subject, reference, case.batch, rows, layers)
    dist.destroy_process_group()
    return results


def dumps(cases: dict[Path, Case], measured: list[tuple[float, float]]) -> None:
    """Show dumpers a series of (k3, gradient norm), each into a folder of its own."""
    for out, case in cases.items():
        _dump_series(case, out, measured)
    dist.barrier()
    dist.destroy_process_group()


def _dump_series(case: Case, out: Path, measured: list[tuple[float, float]]) -> None:
    """Weights are all i in iteration i, and -1 after its update."""
    actor = make_actor(case.config, case.tensors)
    dumper = Dumper(case.config, out, actor, _task())
    rollouts = [
        Rollout(Request(row // 2, row % 2, (1,), row), (2,), (0.0,), row == 1, 7)
        for row in range(len(case.batch))
    ]
    groups = RolloutGroups(rollouts, torch.arange(len(rollouts)).float().view(-1, 2), 0.0)
    zeros = torch.zeros_like(case.batch.rollout_logprobs)
    known = torch.arange(len(case.batch)) < 2
    for iteration, (k3, norm) in enumerate(measured):
        _fill(actor, float(iteration))
        dumper.keep_weights()
        _fill(actor, -1.0)
        facts = Measured(zeros - 1, known, [(norm, False)], {"mismatch/k3_kl": k3}, 2 * iteration)
        dumper.see(iteration, groups, case.batch, facts)


def _fill(actor: Actor, value: float) -> None:
    with torch.no_grad():
        for _, view in actor.weights.views():
            view.fill_(value)


def _task() -> Task:
    def grader() -> Any:
        raise AssertionError("nothing is graded here")

    return Task({}, {}, (0,), lambda ids: f"<{ids[0]}>", grader, (), {})
