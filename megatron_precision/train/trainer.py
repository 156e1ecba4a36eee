"""One run on one rank: it opens, calls the parts of each iteration, and ends.

`loop.py` calls the parts in order. The trainer has engines (`Session`), a `Recorder` and
`Checkpoints`; these return values and never call back.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_precision.actor.actor import LossFunction
from megatron_precision.actor.batch import Batch, MicroBatch, make_batch
from megatron_precision.actor.parallel import agree_any
from megatron_precision.checkpoint.run_folder import ALIVE, ANSWERS
from megatron_precision.config.errors import Stopped
from megatron_precision.config.schema import RunConfig
from megatron_precision.data import start as starts
from megatron_precision.data.tasks import PromptOrder, TaskPrompt
from megatron_precision.precision.loss_scale import calibrate, classify
from megatron_precision.rl.advantages import group_advantages
from megatron_precision.rl.algorithms import algorithm
from megatron_precision.train import evaluation
from megatron_precision.train.checkpoints import (
    Checkpoints,
    RunState,
    Standing,
    Written,
    describe,
)
from megatron_precision.train.dumps import Dumper, Measured
from megatron_precision.train.objective import policy_objective
from megatron_precision.train.recorder import (
    Counters,
    PhaseClock,
    RangeRecord,
    Recorder,
    rollout_metrics,
    run_event,
    step_metrics,
)
from megatron_precision.train.rollouts import RolloutGroups, sample_rounds
from megatron_precision.train.session import Offloader, Session, peak_memory_gib
from megatron_precision.train.watchdog import StopRequest, Watchdog, give_up_where_hopeless


class Trainer:
    """Runs the parts of an iteration on this rank; every rank calls every method.

    Args:
        out: the run's folder.
        end: ends this rank, where its watchdog finds that the job hangs.
        start: a prepared start; by default the cache's.
        resume: continue from the newest checkpoint in `out`, where there is one.

    Attributes:
        order: the order of prompts, for an iteration's first round.
        dumper: writes iterations for `replay`.

    Raises:
        UserError: for a start or a checkpoint that cannot be used.
        PrecisionAuditError: where a tensor has another dtype than the policy's.
        WeightSyncError: where the engine does not hold what was pushed.
    """

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        end: Callable[[Exception], None],
        start: Path | None,
        resume: bool,
    ) -> None:
        self.config = config
        self.algorithm = algorithm(config.algo.name)
        self._out = out
        self._described = describe(config)
        self._measured = Measured()
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
        self._recorder = Recorder(self.counters)
        self._ranges = RangeRecord()
        self._state = RunState(
            self.session, self.counters, (self.order, self._further_order), self.dumper,
            self._ranges,
        )  # fmt: skip
        self._checkpoints = Checkpoints(config, out, self.session)
        self._open(resume)
        self._stop = StopRequest()
        self._stop.install()
        self._standing = self._read_standing()
        self._watchdog.begin()

    def _open(self, resume: bool) -> None:
        """Load the first weights or a checkpoint, start the engine, and open the run's files."""
        self._found = found = self._checkpoints.find(resume)
        of_rank = self._checkpoints.load(found)
        self.session.open_engine()
        if found is not None:
            self.session.engine.weight_version = found.state["weight_version"]
        self._dtypes = self.session.check()
        self._offloader = Offloader(self.session, self.config)
        if found is not None:
            self._state.restore(found.state, of_rank)
        self._checkpoints.go_back_to(found)
        self._recorder.open(self.config, self._out, self.counters.elapsed_s)

    @property
    def resumed(self) -> bool:
        """True if the run continues from a checkpoint."""
        return self._found is not None

    # ---- the run -------------------------------------------------------------------------

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Write the first and the last event of the run around a block, and close the session."""
        found, config = self._found, self.config
        event = (
            run_event(config, self._dtypes, self.session.task)
            if found is None
            else found.event(config)
        )
        try:
            with self._recorder.run("run" if found is None else "resume", event):
                yield
        finally:
            self._watchdog.close()
            self.session.close()

    def iterations(self) -> Iterator[int]:
        """Yield the number of each iteration that is left, and write due checkpoints in between.

        Raises:
            Stopped: where a signal has asked for it.
        """
        while True:
            with self._watchdog.phase(self.counters.iteration, "checkpoint"):
                self._checkpoint_where_due()
            if self.counters.iteration >= self.config.train.iterations:
                return
            self.stop_where_asked()
            yield self.counters.iteration

    def stop_where_asked(self) -> None:
        """End the run where a signal asked for it, with a checkpoint of the finished iterations.

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
                self._begin_checkpoint()
                self._note(self._checkpoints.finished(wait=True))
        raise Stopped(f"stopped by {name} after {done} iterations; --resume goes on from there")

    def _checkpoint_where_due(self) -> None:
        """Begin and finish the checkpoints that are due between two iterations."""
        due = self._checkpoints.is_due(self.counters.iteration)
        self._note(self._checkpoints.finished(wait=due))
        self._standing = self._read_standing()
        if due:
            self._begin_checkpoint()
            self._note(self._checkpoints.finished(wait=False))
        if self.counters.iteration >= self.config.train.iterations:
            self._note(self._checkpoints.finished(wait=True))

    def _begin_checkpoint(self) -> None:
        with self._offloader.trainer_on_device():
            self._checkpoints.begin(self._standing)

    def _read_standing(self) -> Standing:
        return self._state.standing(
            self._described, self._recorder.elapsed_s, self._recorder.sizes()
        )

    def _note(self, written: Written | None) -> None:
        if written is not None:
            self._recorder.write("checkpoint", written.iteration, written.cost)

    @contextmanager
    def _phase(self, iteration: int, name: str) -> Iterator[None]:
        """Count a phase's time, and have the watchdog watch it."""
        with self._watchdog.phase(iteration, name), self._recorder.clock.phase(name):
            yield

    # ---- rollout -------------------------------------------------------------------------

    def rollout(self, iteration: int, prompts: list[TaskPrompt]) -> RolloutGroups:
        """Sample the iteration's groups and start the iteration's clock.

        The metrics count everything that was sampled, also groups that the batch leaves out.

        Returns:
            The groups of the batch.
        """
        self._recorder.begin_iteration()
        self._measured = Measured()

        def sample(number: int, count: int) -> RolloutGroups:
            return self.session.rollouts.sample(
                prompts if number == 0 else self._further_order.take(count),
                rollouts_per_prompt=self.config.train.rollouts_per_prompt,
                # A question may come again in a further round, and must not repeat its group.
                purpose="train" if number == 0 else f"train, round {number}",
                iteration=iteration,
                temperature=self.config.rollout.temperature,
                logprobs=True,
                truncated=self.config.task.truncated,
            )

        dynamic = self.algorithm.dynamic_sampling
        further_rounds = self.config.algo.dynamic_sampling_rounds if dynamic else 0
        with self._phase(iteration, "rollout"):
            sampled, batch = sample_rounds(sample, len(prompts), further_rounds)
        self._recorder.clock.add("rollout", -sampled.reward_s)
        self._recorder.clock.add("reward", sampled.reward_s)
        self._recorder.failures.record(sampled.failures)
        seconds = self._recorder.clock.seconds("rollout")
        self._recorder.iteration = rollout_metrics(sampled, batch, seconds)
        return batch

    def assemble(self, sampled: RolloutGroups) -> Batch:
        """Compute advantages and pad the whole job's rollouts into one batch.

        Raises:
            RuntimeError: where a rollout was sampled with another version of the weights.
        """
        self._offloader.reload_trainer()
        versions = {rollout.weight_version for rollout in sampled.rollouts}
        if versions != {self.counters.weight_version}:
            raise RuntimeError(
                f"rollouts of weight versions {sorted(versions)} in an iteration of version "
                f"{self.counters.weight_version}: their mismatch would be staleness"
            )
        prompts = [rollout.request.prompt_tokens for rollout in sampled.rollouts]
        return make_batch(
            prompts,
            [rollout.tokens for rollout in sampled.rollouts],
            [rollout.rollout_logprobs for rollout in sampled.rollouts],
            group_advantages(
                self.algorithm,
                self.config.algo,
                rewards=sampled.rewards,
                response_tokens=sampled.response_tokens,
                max_response_tokens=self.config.rollout.max_response_tokens,
            ).flatten(),
            [rollout.routed_experts for rollout in sampled.rollouts],
        )

    # ---- training ------------------------------------------------------------------------

    def mini_batches(self, batch: Batch) -> list[torch.Tensor]:
        """Return the row numbers of each optimizer step: consecutive groups."""
        return list(torch.arange(len(batch)).chunk(self.config.train.steps_per_iteration))

    def old_logprobs(self, iteration: int, batch: Batch) -> Batch:
        """Add the trainer's log-probs before the update, where the algorithm or the user asks.

        Rows of the first mini-batch stay zero: their own step computes them, before any update.
        """
        every = self.config.train.mismatch_every
        asked = every > 0 and iteration % every == 0
        if not (self.algorithm.needs_old_logprobs or asked):
            return batch
        with self._phase(iteration, "old_logprobs"):
            old = self.actor.logprobs(batch, self.mini_batches(batch)[1:])
        return batch.with_old_logprobs(old)

    def step(self, iteration: int, number: int, batch: Batch, rows: torch.Tensor) -> None:
        """Take one optimizer step; one that overflows is counted and changes nothing.

        Raises:
            UserError: where every step overflows and no loss scale is left to try.
        """
        with self._phase(iteration, "train"):
            loss = policy_objective(
                self.algorithm,
                self.config.algo,
                batch,
                rows,
                self.config.rollout.max_response_tokens,
                before_update=number == 0,
            )
            plan = self.actor.plan(batch, rows)
            if not self.counters.calibrated:
                self._calibrate(batch, plan, loss)
            clock = PhaseClock()
            # Before the first update both sides hold the same weights: the mismatch is free.
            result = self.actor.step(batch, plan, loss, keep_logprobs=number == 0)
        if number == 0:
            flips = self.actor.router_flips()
            self._recorder.iteration |= flips.metrics() if flips is not None else {}
            self._recorder.iteration |= self._measured.compare(result, batch, rows)
        cause = ""
        self._measured.grad_norms.append((result.outcome.grad_norm, result.outcome.skipped))
        if result.outcome.skipped:
            self.counters.skipped += 1
            cause = classify(
                finite_forward=result.finite_forward,
                weight_max=result.maxima["weight"],
                headroom_bits=self.config.loss_scale.headroom_bits,
            )
        scale = self.actor.optimizer.loss_scale
        self.counters.step += 1
        self._ranges.add(self.actor.range_watch)
        self._recorder.write(
            "step",
            iteration,
            {
                **step_metrics(result),
                "precision/loss_scale": scale.value if scale else 1.0,
                "precision/overflow_cause": cause,
                "precision/grad_subnormal_share": self._ranges.subnormal_shares[-1],
                **self.actor.packing_metrics(batch, rows),
                "time/step_s": clock.metrics()["time/iteration_s"],
            },
        )
        give_up_where_hopeless(self.actor.optimizer, self.config.loss_scale, cause)

    def _calibrate(self, batch: Batch, plan: list[MicroBatch], loss: LossFunction) -> None:
        """Set the starting loss scale from the first mini-batch, once a run."""
        self.counters.calibrated = True
        settings, scale = self.config.loss_scale, self.actor.optimizer.loss_scale
        if scale is None or settings.initial != "calibrated":
            return

        def overflows_at(value: float) -> bool:
            scale.value = value
            self.actor.gradients(batch, plan, loss)
            return agree_any(not self.actor.gradients_are_finite())

        scale.value = calibrate(overflows_at, settings.headroom_bits)

    # ---- dumps, sync, evaluation ---------------------------------------------------------

    def dump(self, iteration: int, groups: RolloutGroups, batch: Batch) -> None:
        """Dump the iteration where that is due (`train/dumps.py`)."""
        measured = replace(
            self._measured, metrics=dict(self._recorder.iteration), step=self.counters.step
        )
        self.dumper.see(iteration, groups, batch, measured)

    def sync_weights(self) -> None:
        """Push the weights into the engine, under a new version where a step was applied."""
        if self.actor.optimizer.applied_steps > 0:
            self.counters.weight_version = self.actor.optimizer.applied_steps
        with self._phase(self.counters.iteration, "sync"):
            self._offloader.wake_engine_weights()
            result = self.session.sync.push(self.counters.weight_version)
            self._offloader.offload_trainer()
        self._recorder.iteration |= result.metrics(self.counters.weight_version)

    def finish_iteration(self, iteration: int, batch: Batch) -> None:
        """Write the iteration's event and count it."""
        scale = self.actor.optimizer.loss_scale
        times = self._recorder.clock.metrics()
        engine_act_max = self.session.engine.take_act_max()
        self._recorder.iteration |= {
            **self._ranges.metrics(engine_act_max, peak_memory_gib()),
            "precision/loss_scale": scale.value if scale else 1.0,
            "precision/skipped_total": self.counters.skipped,
            "throughput/tokens_per_s": float(batch.response_mask.sum()) / times["time/iteration_s"],
            **times,
        }
        self._recorder.write("iteration", iteration, self._recorder.iteration)
        self._ranges.clear()
        self.counters.iteration = iteration + 1

    def evaluation_is_due(self, iteration: int) -> bool:
        """Say whether an evaluation is due after `iteration` iterations; it is after the last."""
        every = self.config.eval.every
        last = iteration == self.config.train.iterations
        return last or (every > 0 and iteration % every == 0)

    def evaluate(self, iteration: int) -> None:
        """Measure accuracy on the held-out sets with the engine's weights."""
        clock = PhaseClock()
        with self._watchdog.phase(iteration, "evaluation"):
            found = evaluation.evaluate(self.session, self.config.eval, iteration)
        self._recorder.failures.record(found.failures)
        if not found.metrics:
            return
        self.counters.evaluated(iteration, found.metrics["eval/accuracy"])
        if dist.get_rank() == 0:
            evaluation.write_answers(self._out / ANSWERS / f"{iteration:06d}.jsonl", found)
        self._recorder.write(
            "eval",
            iteration,
            {**found.metrics, "time/eval_s": clock.metrics()["time/iteration_s"]},
        )
