"""A run from its opening to its end: first weights or a checkpoint, files, signals, last lines.

What an iteration does is in `iteration.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_precision.actor.parallel import agree_any
from megatron_precision.checkpoint import store
from megatron_precision.checkpoint import store as generators
from megatron_precision.checkpoint.run_folder import ALIVE, FAILED_GRADES, METRICS, go_back
from megatron_precision.config.errors import Stopped
from megatron_precision.config.schema import RunConfig, fingerprint, to_dict
from megatron_precision.data import start as starts
from megatron_precision.data.tasks import PromptOrder
from megatron_precision.observe.metrics import MetricsWriter
from megatron_precision.observe.sinks import make_sinks
from megatron_precision.platform import startup
from megatron_precision.rl.algorithms import ALGORITHMS
from megatron_precision.train.checkpoints import (
    Checkpoints,
    Counters,
    Standing,
    Written,
    counters,
    describe,
    newest_whole,
)
from megatron_precision.train.dumps import Dumper, Measured
from megatron_precision.train.recorder import FailedGrades, PhaseClock
from megatron_precision.train.session import HandOver, Session
from megatron_precision.train.watchdog import StopRequest, Watchdog


class Run:
    """State of a run on this rank, between two iterations."""

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        end: Callable[[Exception], None],
        start: Path | None,
        resume: bool,
    ) -> None:
        self.config = config
        self.algorithm = ALGORITHMS[config.algo.name]
        self._extra_rounds = (
            config.algo.dynamic_sampling_rounds if self.algorithm.dynamic_sampling else 0
        )
        self._out = out
        self._described = describe(config)
        model_dir, task = starts.open_start(config, start)
        self.order = PromptOrder(task, config.seed)
        self._further_order = PromptOrder(task, config.seed, stream="further rounds")
        limits = config.watchdog.limits()
        self.session = Session(
            config, config.optimizer, config.loss_scale, model_dir, task,
            # The watchdog comes first: it knows who is missing.
            collective_timeout_s=max(limits.values()) + 60.0,
        )  # fmt: skip
        self._watchdog = Watchdog(limits, out / ALIVE, dist.get_rank(), dist.get_world_size(), end)
        self.actor = self.session.actor
        self.dumper = Dumper(config, out, self.actor, task)
        self.counters = Counters(calibrated=self.actor.optimizer.loss_scale is None)
        self._checkpoints = Checkpoints(config, out, self.session)
        # Where a job was restarted, its ranks may have seen the folder at different times.
        resume = agree_any(resume)
        self._found = newest_whole(config, out) if resume else None
        self._whole = PhaseClock()
        self._clock = PhaseClock()
        self._measured = Measured()
        self._iteration: dict[str, object] = {}
        self._trainer_act_max = 0.0
        self._subnormal_shares: list[float] = []
        self._last_subnormal_share = 0.0
        self._begin(resume)
        self._stop = StopRequest()
        self._stop.install()
        self._standing = self._stand()
        self._watchdog.begin()

    def _begin(self, resume: bool) -> None:
        """Load the first weights or a checkpoint, start the engine, and open the run's files."""
        found, out = self._found, self._out
        if found is None:
            self.session.load_start()
        else:
            ranks = found.state["config"]["parallel"]["world_size"]
            same_ranks = ranks == self.config.parallel.world_size
            steps = found.state["applied_steps"]
            of_rank = store.read(self.actor, found.folder, steps, same_ranks)
        self.session.open_engine()
        if found is not None:
            self.session.engine.weight_version = found.state["weight_version"]
        self._dtypes = self.session.check()
        self._hand_over = HandOver(self.session, self.config)
        if found is not None:
            self._restore(found.state, of_rank)
        self._writer: MetricsWriter | None = None
        first = dist.get_rank() == 0
        if first and resume:
            go_back(out, None if found is None else found.state)
            for line in found.lines() if found else [f"no checkpoint in {out}: from the beginning"]:
                print(line, flush=True)
        self._failures = FailedGrades(out / FAILED_GRADES if first else None)
        if first:
            sinks = make_sinks(self.config.sinks, out, self.config.train.iterations)
            self._writer = MetricsWriter(out / METRICS, sinks, self.counters.elapsed_s)

    @property
    def resumed(self) -> bool:
        """Whether it goes on from a checkpoint."""
        return self._found is not None

    @contextmanager
    def _phase(self, iteration: int, name: str) -> Iterator[None]:
        """Count a phase's time, and watch that it ends."""
        with self._watchdog.phase(iteration, name), self._clock.phase(name):
            yield

    # ---- standing ------------------------------------------------------------------------

    def _stand(self) -> Standing:
        """What has to be known to go on from here; see `_restore`."""
        optimizer = self.actor.optimizer
        now = {
            **asdict(self.counters),
            "elapsed_s": self._elapsed_s(),
            "applied_steps": optimizer.applied_steps,
            "hopeless_overflows": optimizer.hopeless_overflows,
            "loss_scale": optimizer.loss_scale.state() if optimizer.loss_scale else None,
            "orders": [self.order.state(), self._further_order.state()],
            "dumps": self.dumper.state(),
        }
        of_rank = {
            "generators": generators.capture(),
            "act_max": [self._trainer_act_max, self.session.engine.act_max],
        }
        files = {METRICS: self._writer.size, **self._failures.sizes()} if self._writer else {}
        return Standing({**now, **self._described, "files": files}, of_rank)

    def _restore(self, state: dict[str, Any], of_rank: dict[str, Any]) -> None:
        """Go on where a checkpoint's trainer stood; weights and optimizer are loaded already."""
        self.counters = counters(state)
        optimizer = self.actor.optimizer
        optimizer.hopeless_overflows = state["hopeless_overflows"]
        if optimizer.loss_scale is not None:
            optimizer.loss_scale.restore(state["loss_scale"])
        self.order.restore(state["orders"][0])
        self._further_order.restore(state["orders"][1])
        self.dumper.restore(state["dumps"])
        self._checkpoints.last = self.counters.iteration
        if of_rank:
            self._trainer_act_max, self.session.engine.act_max = of_rank["act_max"]
            generators.restore(of_rank["generators"])

    def stop_where_asked(self) -> None:
        """End the run where a signal has asked for it, with a checkpoint of what is done.

        Raises:
            Stopped: on every rank.
        """
        name = self._stop.agreed()
        if not name:
            return
        done = self._standing.iteration
        if done == 0:
            raise Stopped(f"stopped by {name} before the first iteration was done")
        with self._watchdog.phase(done, "checkpoint"):
            self._note(self._checkpoints.finished(wait=True))
            if self._checkpoints.last != done:
                with self._hand_over.trainer_present():
                    self._checkpoints.begin(self._standing)
                self._note(self._checkpoints.finished(wait=True))
        raise Stopped(f"stopped by {name} after {done} iterations; --resume goes on from there")

    def _note(self, written: Written | None) -> None:
        if written is not None:
            self._write("checkpoint", written.iteration, written.cost)

    def iterations(self) -> Iterator[int]:
        """The numbers of the iterations that are left, with the checkpoints that are due between.

        Raises:
            Stopped: where a signal has asked for it.
        """
        while True:
            with self._watchdog.phase(self.counters.iteration, "checkpoint"):
                done = self._checkpoint_where_due()
            if done:
                return
            self.stop_where_asked()
            yield self.counters.iteration

    def _checkpoint_where_due(self) -> bool:
        """Begin and finish what is due between two iterations; whether the last one is done."""
        due = self._checkpoints.is_due(self.counters.iteration)
        self._note(self._checkpoints.finished(wait=due))
        self._standing = self._stand()
        if due:
            with self._hand_over.trainer_present():
                self._checkpoints.begin(self._standing)
            self._note(self._checkpoints.finished(wait=False))
        last = self.counters.iteration >= self.config.train.iterations
        if last:
            self._note(self._checkpoints.finished(wait=True))
        return last

    # ---- recording -----------------------------------------------------------------------

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Write the first and the last line of `metrics.jsonl` around the run."""
        if self._found is None:
            self._write("run", 0, self._run_event())
        else:
            self._write("resume", self.counters.iteration, self._found.event(self.config))
        try:
            yield
        except Stopped as stop:
            self._end("stopped", str(stop))
            dist.barrier()  # torchrun ends every rank as soon as one has ended
            raise
        except BaseException as error:
            self._end("failed", f"{type(error).__name__}: {error}")
            raise
        finally:
            self._watchdog.close()
            self.session.close()
        self._end("completed", "")

    def _run_event(self) -> dict[str, Any]:
        config = self.config
        return {
            "config": to_dict(config),
            "fingerprint": fingerprint(to_dict(config)),
            "versions": startup.versions(),
            "platform": startup.describe(),
            "dtypes": self._dtypes,
            "start_fingerprint": starts.start_fingerprint(config),
            "prompts": self.session.task.counts,
            "rank_count": dist.get_world_size(),
        }

    def _end(self, status: str, error: str) -> None:
        if self._writer is not None:
            self._writer.write(
                "end",
                iteration=self.counters.iteration,
                step=self.counters.step,
                values={"status": status, "error": error, "time/total_s": self._elapsed_s()},
            )
            self._writer.close()

    def _elapsed_s(self) -> float:
        return self.counters.elapsed_s + self._whole.metrics()["time/iteration_s"]

    def _write(self, event: str, iteration: int, values: Mapping[str, Any]) -> None:
        if self._writer is not None:
            self._writer.write(event, iteration=iteration, step=self.counters.step, values=values)
