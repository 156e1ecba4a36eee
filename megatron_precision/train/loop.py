"""The loop: sample, measure the mismatch, train, sync; one event a step, one an iteration."""

from __future__ import annotations

from pathlib import Path

from megatron_precision.config import RunConfig
from megatron_precision.data.order import prompts_for_iteration
from megatron_precision.train.iteration import Trainer


def run(config: RunConfig, out: Path, start: Path | None = None) -> None:
    """Train `config` from its prepared start; called on every rank of the world.

    Args:
        out: the run's folder; `metrics.jsonl` is written there by rank 0.
        start: a prepared start, by default the cache's.
    """
    trainer = Trainer(config, out, start)
    with trainer.recording():
        trainer.evaluate(iteration=0)
        for iteration in range(config.train.iterations):
            chosen = prompts_for_iteration(
                len(trainer.questions), iteration, config.train.prompts_per_iteration, config.seed
            )
            groups = trainer.rollout(iteration, [trainer.questions[i] for i in chosen])
            batch = trainer.assemble(groups)
            batch = trainer.old_logprobs(iteration, batch)
            for number, rows in enumerate(trainer.mini_batches(batch)):
                trainer.step(iteration, number, batch, rows)
            trainer.sync_weights()
            trainer.finish_iteration(iteration, batch)
            if trainer.evaluation_is_due(iteration + 1):
                trainer.evaluate(iteration + 1)
