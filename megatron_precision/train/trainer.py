"""The parts of an iteration, in the order in which the loop calls them."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist

from megatron_precision.actor.actor import LossFunction, StepResult
from megatron_precision.actor.batch import Batch, MicroBatch, make_batch
from megatron_precision.actor.parallel import agree_any
from megatron_precision.checkpoint.run_folder import ANSWERS
from megatron_precision.data.tasks import TaskPrompt
from megatron_precision.precision.loss_scale import calibrate, classify
from megatron_precision.precision.range_watch import larger_or_nan
from megatron_precision.rl.advantages import group_advantages, zero_variance_share
from megatron_precision.rl.mismatch import mismatch_stats
from megatron_precision.train import evaluation
from megatron_precision.train.dumps import Measured
from megatron_precision.train.objective import policy_objective
from megatron_precision.train.recorder import PhaseClock
from megatron_precision.train.rollouts import RolloutGroups, sample_rounds
from megatron_precision.train.run import Run
from megatron_precision.train.session import peak_memory_gib
from megatron_precision.train.watchdog import give_up_where_hopeless


class Trainer(Run):
    """The steps of an iteration, on this rank."""

    # ---- rollout -------------------------------------------------------------------------

    def rollout(self, iteration: int, prompts: list[TaskPrompt]) -> RolloutGroups:
        """Sample the iteration's groups; the clock of the iteration starts here.

        Metrics are of everything that was sampled, what the batch leaves out included.
        """
        self._clock = PhaseClock()
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

        with self._phase(iteration, "rollout"):
            sampled, batch = sample_rounds(sample, len(prompts), self._extra_rounds)
        self._clock.add("rollout", -sampled.reward_s)
        self._clock.add("reward", sampled.reward_s)
        self._failures.record(sampled.failures)
        lengths = sampled.response_tokens.float()
        self._iteration = {
            "reward/mean": float(sampled.rewards.mean()),
            "reward/accuracy": float((sampled.rewards > 0).float().mean()),
            "reward/zero_variance_share": zero_variance_share(sampled.rewards),
            "reward/failed_share": len(sampled.failures) / len(sampled.rollouts),
            "reward/sampled_groups": len(sampled.rewards),
            "reward/batch_zero_variance_share": zero_variance_share(batch.rewards),
            "response/tokens_mean": float(lengths.mean()),
            "response/tokens_max": float(lengths.max()),
            "response/truncated_share": sum(r.truncated for r in sampled.rollouts)
            / len(sampled.rollouts),
            "throughput/rollout_tokens_per_s": float(lengths.sum())
            / self._clock.seconds("rollout"),
        }
        return batch

    def assemble(self, sampled: RolloutGroups) -> Batch:
        """Advantages, and one padded batch of the whole job's rollouts."""
        self._hand_over.to_trainer()
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
        """Rows of each optimizer step: consecutive groups."""
        return list(torch.arange(len(batch)).chunk(self.config.train.steps_per_iteration))

    def old_logprobs(self, iteration: int, batch: Batch) -> Batch:
        """The trainer's log-probs before the update, where the algorithm or the user asks.

        Those of the first mini-batch are left zero: its own step computes them, before any update.
        """
        every = self.config.train.mismatch_every
        asked = every > 0 and iteration % every == 0
        if not (self.algorithm.needs_old_logprobs or asked):
            return batch
        with self._phase(iteration, "old_logprobs"):
            old = self.actor.logprobs(batch, self.mini_batches(batch)[1:])
        return batch.with_old_logprobs(old)

    def _record_mismatch(self, step: StepResult, batch: Batch, rows: torch.Tensor) -> None:
        """Statistics of engine against trainer, of all rows whose old log-probs are known.

        Args:
            step: the first of the iteration, which kept its log-probs.
            rows: its sequences.
        """
        assert step.logprobs is not None
        flips = self.actor.router_flips()
        self._iteration.update(flips.metrics() if flips is not None else {})
        known = torch.ones(len(batch), dtype=torch.bool)
        if batch.old_logprobs is None:
            known.zero_()
        known[rows] = step.finite_forward
        if not known.any():
            return
        old = step.logprobs if batch.old_logprobs is None else batch.old_logprobs + step.logprobs
        self._measured.old_logprobs, self._measured.old_known = old, known
        stats = mismatch_stats(
            old_logprobs=old[known],
            rollout_logprobs=batch.rollout_logprobs[known],
            mask=batch.response_mask[known],
        )
        self._iteration.update(stats.metrics())

    def step(self, iteration: int, number: int, batch: Batch, rows: torch.Tensor) -> None:
        """One optimizer step, or a counted skip."""
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
            self._record_mismatch(result, batch, rows)
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
        tokens = max(1.0, result.sums["tokens"])
        self.counters.step += 1
        self._watch_trainer_range()
        self._write(
            "step",
            iteration,
            {
                "loss/policy": result.loss,
                "loss/grad_norm": result.outcome.grad_norm,
                "loss/clip_fraction": result.sums["clipped"] / tokens,
                "loss/entropy": result.sums["entropy"] / tokens,
                "loss/ratio_mean": result.sums["ratio"] / tokens,
                "loss/ratio_max": result.maxima["ratio"],
                "loss/weight_max": result.maxima["weight"],
                "loss/correction_mean": result.sums["correction"] / tokens,
                "loss/cut_token_share": result.sums["cut_tokens"] / tokens,
                "loss/cut_sequence_share": result.sums["cut_sequences"]
                / max(1.0, result.sums["sequences"]),
                "loss/learning_rate": result.outcome.learning_rate,
                "precision/loss_scale": scale.value if scale else 1.0,
                "precision/skipped": int(result.outcome.skipped),
                "precision/overflow_cause": cause,
                "precision/grad_subnormal_share": self._last_subnormal_share,
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

    # ---- range ---------------------------------------------------------------------------

    def _watch_trainer_range(self) -> None:
        watch = self.actor.range_watch
        self._trainer_act_max = larger_or_nan(self._trainer_act_max, watch.act_max)
        self._last_subnormal_share = watch.grad_subnormal_share
        self._subnormal_shares.append(watch.grad_subnormal_share)

    # ---- dumps, sync, evaluation ---------------------------------------------------------

    def dump(self, iteration: int, groups: RolloutGroups, batch: Batch) -> None:
        """Write the iteration down where that is due (`train/dumps.py`)."""
        measured = replace(self._measured, metrics=dict(self._iteration), step=self.counters.step)
        self.dumper.see(iteration, groups, batch, measured)

    def sync_weights(self) -> None:
        """Hand the weights to the engine, under a new version where any step was applied."""
        if self.actor.optimizer.applied_steps > 0:
            self.counters.weight_version = self.actor.optimizer.applied_steps
        with self._phase(self.counters.iteration, "sync"):
            self._hand_over.before_sync()
            result = self.session.sync.push(self.counters.weight_version)
            self._hand_over.to_engine()
        self._iteration |= {
            "sync/s": result.seconds,
            "sync/bytes": result.bytes,
            "sync/received_bytes": result.received_bytes,
            "sync/proof_s": result.proof_seconds,
            "sync/verified": int(result.regions > 0),
            "sync/regions": result.regions,
            "sync/weight_version": self.counters.weight_version,
        }

    def finish_iteration(self, iteration: int, batch: Batch) -> None:
        """Write the iteration's event."""
        scale = self.actor.optimizer.loss_scale
        times = self._clock.metrics()
        shares = self._subnormal_shares
        engine_act_max = self.session.engine.take_act_max()
        ranges = torch.tensor([self._trainer_act_max, engine_act_max, peak_memory_gib()])
        ranges.nan_to_num_(nan=float("inf"), posinf=float("inf"))  # a maximum can drop a nan
        dist.all_reduce(ranges, op=dist.ReduceOp.MAX)
        self._iteration |= {
            "precision/act_max_trainer": float(ranges[0]),
            "precision/act_max_rollout": float(ranges[1]),
            "precision/grad_subnormal_share": sum(shares) / max(1, len(shares)),
            "precision/loss_scale": scale.value if scale else 1.0,
            "precision/skipped_total": self.counters.skipped,
            "throughput/tokens_per_s": float(batch.response_mask.sum()) / times["time/iteration_s"],
            "memory/peak_gib": float(ranges[2]),
            **times,
        }
        self._write("iteration", iteration, self._iteration)
        self._trainer_act_max, self._subnormal_shares = 0.0, []
        self.counters.iteration = iteration + 1

    def evaluation_is_due(self, iteration: int) -> bool:
        """After every `eval.every` iterations, and after the last."""
        every = self.config.eval.every
        last = iteration == self.config.train.iterations
        return last or (every > 0 and iteration % every == 0)

    def evaluate(self, iteration: int) -> None:
        """Accuracy on the held-out sets with the weights that the engine holds."""
        clock = PhaseClock()
        with self._watchdog.phase(iteration, "evaluation"):
            found = evaluation.evaluate(self.session, self.config.eval, iteration)
        self._failures.record(found.failures)
        if not found.metrics:
            return
        self.counters.evaluated(iteration, found.metrics["eval/accuracy"])
        if dist.get_rank() == 0:
            evaluation.write_answers(self._out / ANSWERS / f"{iteration:06d}.jsonl", found)
        self._write(
            "eval",
            iteration,
            {**found.metrics, "time/eval_s": clock.metrics()["time/iteration_s"]},
        )
