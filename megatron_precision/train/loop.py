"""The training loop: sample, train, sync. It writes one event per step and one per iteration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from megatron_precision.config.schema import RunConfig
from megatron_precision.train.trainer import Trainer


def run(
    config: RunConfig,
    out: Path,
    end: Callable[[Exception], None],
    start: Path | None = None,
    resume: bool = False,
) -> None:
    """Train `config` from its prepared start; every rank of the world calls it.

    Args:
        out: the run's folder; rank 0 writes `metrics.jsonl` there.
        end: ends this rank's process; the watchdog calls it when the job hangs.
        start: a prepared start; by default the cache's.
        resume: continue from the newest checkpoint in `out`, if there is one.

    Raises:
        Stopped: where a signal ended the run; a checkpoint is written first.
    """
    trainer = Trainer(config, out, end, start, resume)
    with trainer.recording():
        if not trainer.resumed:
            trainer.evaluate(iteration=0)
        for iteration in trainer.iterations():
            prompts = trainer.order.take(config.train.prompts_per_iteration)
            groups = trainer.rollout(iteration, prompts)
            trainer.stop_where_asked()  # the last moment at which nothing has changed
            batch = trainer.assemble(groups)
            trainer.dumper.keep_weights()
            batch = trainer.old_logprobs(iteration, batch)
            for number, rows in enumerate(trainer.mini_batches(batch)):
                trainer.step(iteration, number, batch, rows)
            trainer.dump(iteration, groups, batch)
            trainer.sync_weights()
            trainer.finish_iteration(iteration, batch)
            if trainer.evaluation_is_due(iteration + 1):
                trainer.evaluate(iteration + 1)
