"""What a run records: its events, the grades that failed, and the time that each phase takes.

Rank 0 writes `metrics.jsonl` and `failed_grades.txt`; the other ranks keep the same numbers and
write nothing.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_precision.actor.actor import StepResult
from megatron_precision.checkpoint.run_folder import FAILED_GRADES, METRICS
from megatron_precision.config.errors import Stopped
from megatron_precision.config.schema import RunConfig, fingerprint, to_dict
from megatron_precision.data.start import start_fingerprint
from megatron_precision.data.tasks import Task
from megatron_precision.observe.metrics import MetricsWriter
from megatron_precision.observe.sinks import make_sinks
from megatron_precision.platform import startup
from megatron_precision.precision.range_watch import RangeWatch, larger_or_nan
from megatron_precision.rewards.grading import Grade
from megatron_precision.rl.advantages import zero_variance_share
from megatron_precision.train.rollouts import RolloutGroups


@dataclass
class Counters:
    """Counts iterations, steps and seconds of a run.

    Attributes:
        iteration: the number of finished iterations, which is the next one's number.
        step: optimizer steps attempted so far.
        skipped: steps that overflowed and changed nothing.
        calibrated: whether the starting loss scale is set.
        weight_version: version of the weights that the engine samples with.
        elapsed_s: seconds that the run took in earlier processes.
        evaluation: {"iteration", "accuracy"} of the last evaluation.
        best: the same of the best evaluation so far; of equal ones, the first.
    """

    iteration: int = 0
    step: int = 0
    skipped: int = 0
    calibrated: bool = False
    weight_version: int = 0
    elapsed_s: float = 0.0
    evaluation: dict[str, float] | None = None
    best: dict[str, float] | None = None

    def evaluated(self, iteration: int, accuracy: float) -> None:
        """Record an evaluation's accuracy."""
        self.evaluation = {"iteration": iteration, "accuracy": accuracy}
        if self.best is None or accuracy > self.best["accuracy"]:
            self.best = self.evaluation


class PhaseClock:
    """Adds up wall-clock seconds by phase; time in no phase is `other`."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the time of a block under `name`."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.add(name, time.perf_counter() - begin)

    def add(self, name: str, seconds: float) -> None:
        """Count seconds under `name`."""
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def seconds(self, name: str) -> float:
        """Return the seconds of one phase so far."""
        return self._seconds.get(name, 0.0)

    def metrics(self) -> dict[str, float]:
        """Return `time/<phase>_s` for each phase, `time/other_s`, and `time/iteration_s`, all."""
        whole = time.perf_counter() - self._begin
        named = {f"time/{name}_s": value for name, value in self._seconds.items()}
        return {
            **named,
            "time/other_s": whole - sum(self._seconds.values()),
            "time/iteration_s": whole,
        }


@dataclass
class RangeRecord:
    """The numeric range that the trainer used in an iteration, on this rank.

    Attributes:
        act_max: the largest absolute activation; nan where one was.
        subnormal_shares: for each step, the share of gradients that FP16 would round to a
            subnormal number or zero.
    """

    act_max: float = 0.0
    subnormal_shares: list[float] = field(default_factory=list)

    def add(self, watch: RangeWatch) -> None:
        """Add a step's readings."""
        self.act_max = larger_or_nan(self.act_max, watch.act_max)
        self.subnormal_shares.append(watch.grad_subnormal_share)

    def clear(self) -> None:
        """Forget the iteration."""
        self.act_max, self.subnormal_shares = 0.0, []

    def metrics(self, engine_act_max: float, peak_memory_gib: float) -> dict[str, object]:
        """Return the job's maxima and this rank's mean share; every rank calls it.

        Args:
            engine_act_max: the engine's largest absolute activation on this rank.
            peak_memory_gib: the largest resident set of this process.
        """
        ranges = torch.tensor([self.act_max, engine_act_max, peak_memory_gib])
        ranges.nan_to_num_(nan=float("inf"), posinf=float("inf"))  # a maximum can drop a nan
        dist.all_reduce(ranges, op=dist.ReduceOp.MAX)
        shares = self.subnormal_shares
        return {
            "precision/act_max_trainer": float(ranges[0]),
            "precision/act_max_rollout": float(ranges[1]),
            "precision/grad_subnormal_share": sum(shares) / max(1, len(shares)),
            "memory/peak_gib": float(ranges[2]),
        }


class FailedGrades:
    """Reports of a run's failed grades.

    A response that exceeds the time or memory limit costs its own reward, and the file says so. A
    scorer that raises has a bug, or the right answer is malformed: the console says so, once an
    iteration.
    """

    def __init__(self, path: Path | None) -> None:
        """
        Args:
            path: the file, made with the first report; None on ranks that don't write.
        """
        self._path = path

    def sizes(self) -> dict[str, int]:
        """Return the file's size in bytes so far, by its name."""
        if self._path is None:
            return {}
        return {self._path.name: self._path.stat().st_size if self._path.exists() else 0}

    def record(self, failures: Sequence[Grade]) -> None:
        """Add the reports of an iteration or an evaluation."""
        if self._path is None or not failures:
            return
        with self._path.open("a", encoding="utf-8") as file:
            file.writelines(f"{grade.report}\n\n" for grade in failures)
        raised = [grade for grade in failures if grade.status == "raised"]
        if raised:
            print(
                f"the scorer raised for {len(raised)} responses, the first of them:\n"
                f"{raised[0].report}\nall of them: {self._path}",
                file=sys.stderr,
                flush=True,
            )


class Recorder:
    """Writes a run's events, and collects an iteration's metrics until they are written.

    Attributes:
        iteration: metrics of the current iteration, `area/name` to value.
        clock: seconds of the current iteration by phase.
        failures: the run's failed grades.
    """

    def __init__(self, counters: Counters) -> None:
        """
        Args:
            counters: the run's own; every event carries its step.
        """
        self._counters = counters
        self.iteration: dict[str, object] = {}
        self.clock = PhaseClock()
        self.failures = FailedGrades(None)
        self._run_clock = PhaseClock()
        self._earlier_s = 0.0
        self._writer: MetricsWriter | None = None

    def open(self, config: RunConfig, out: Path, earlier_s: float) -> None:
        """Open the run's files, on rank 0.

        Args:
            earlier_s: seconds that the run took in earlier processes.
        """
        self._earlier_s = earlier_s
        if dist.get_rank() == 0:
            self.failures = FailedGrades(out / FAILED_GRADES)
            sinks = make_sinks(config.sinks, out, config.train.iterations)
            self._writer = MetricsWriter(out / METRICS, sinks, earlier_s)

    @property
    def elapsed_s(self) -> float:
        """Seconds that the run has taken, earlier processes included."""
        return self._earlier_s + self._run_clock.metrics()["time/iteration_s"]

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each file that grows with the run; empty but on rank 0."""
        if self._writer is None:
            return {}
        return {METRICS: self._writer.size, **self.failures.sizes()}

    def begin_iteration(self) -> None:
        """Start the iteration's clock and forget the metrics of the one before."""
        self.clock = PhaseClock()
        self.iteration = {}

    def write(self, event: str, iteration: int, values: Mapping[str, Any]) -> None:
        """Write an event to `metrics.jsonl` and to every sink."""
        if self._writer is not None:
            step = self._counters.step
            self._writer.write(event, iteration=iteration, step=step, values=values)

    @contextmanager
    def run(self, event: str, values: Mapping[str, Any]) -> Iterator[None]:
        """Write the run's first event before a block and its `end` event after it.

        Args:
            event: `run` or `resume`.
        """
        self.write(event, self._counters.iteration, values)
        try:
            yield
        except Stopped as stop:
            self._end("stopped", str(stop))
            dist.barrier()  # torchrun ends every rank as soon as one has ended
            raise
        except BaseException as error:
            self._end("failed", f"{type(error).__name__}: {error}")
            raise
        self._end("completed", "")

    def _end(self, status: str, error: str) -> None:
        values = {"status": status, "error": error, "time/total_s": self.elapsed_s}
        self.write("end", self._counters.iteration, values)
        if self._writer is not None:
            self._writer.close()


def run_event(config: RunConfig, dtypes: Mapping[str, str], task: Task) -> dict[str, Any]:
    """Return the fields of the `run` event: what runs, on what, and in which dtypes.

    Args:
        dtypes: as the audit found them, by kind of tensor.
    """
    return {
        "config": to_dict(config),
        "fingerprint": fingerprint(to_dict(config)),
        "versions": startup.versions(),
        "platform": startup.describe(),
        "dtypes": dtypes,
        "start_fingerprint": start_fingerprint(config),
        "prompts": task.counts,
        "rank_count": dist.get_world_size(),
    }


def rollout_metrics(
    sampled: RolloutGroups, batch: RolloutGroups, seconds: float
) -> dict[str, object]:
    """Return an iteration's metrics of rewards and responses.

    Args:
        sampled: everything that was sampled.
        batch: the groups of it that are trained on.
        seconds: time of sampling, without grading.
    """
    lengths = sampled.response_tokens.float()
    count = len(sampled.rollouts)
    return {
        "reward/mean": float(sampled.rewards.mean()),
        "reward/accuracy": float((sampled.rewards > 0).float().mean()),
        "reward/zero_variance_share": zero_variance_share(sampled.rewards),
        "reward/failed_share": len(sampled.failures) / count,
        "reward/sampled_groups": len(sampled.rewards),
        "reward/batch_zero_variance_share": zero_variance_share(batch.rewards),
        "response/tokens_mean": float(lengths.mean()),
        "response/tokens_max": float(lengths.max()),
        "response/truncated_share": sum(r.truncated for r in sampled.rollouts) / count,
        "throughput/rollout_tokens_per_s": float(lengths.sum()) / seconds,
    }


def step_metrics(result: StepResult) -> dict[str, object]:
    """Return the metrics of a step's loss and gradient."""
    sums, outcome = result.sums, result.outcome
    tokens = max(1.0, sums["tokens"])
    return {
        "loss/policy": result.loss,
        "loss/grad_norm": outcome.grad_norm,
        "loss/clip_fraction": sums["clipped"] / tokens,
        "loss/entropy": sums["entropy"] / tokens,
        "loss/ratio_mean": sums["ratio"] / tokens,
        "loss/ratio_max": result.maxima["ratio"],
        "loss/weight_max": result.maxima["weight"],
        "loss/correction_mean": sums["correction"] / tokens,
        "loss/cut_token_share": sums["cut_tokens"] / tokens,
        "loss/cut_sequence_share": sums["cut_sequences"] / max(1.0, sums["sequences"]),
        "loss/learning_rate": outcome.learning_rate,
        "precision/skipped": int(outcome.skipped),
    }
