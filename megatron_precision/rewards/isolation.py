"""Scores responses in worker processes, so that a hostile one costs its reward and nothing else.

    with ScorerPool(math.score, workers=4) as pool:
        verdicts = pool.score(samples)

A worker has one sample at a time. If a sample runs over its time limit, the worker is killed and
replaced; if it needs more memory than allowed, or kills its worker, it gets a verdict like any
other. Answers come back as JSON and are never unpickled: a worker is not trusted after a response.

Workers are forked from a server process that has loaded the scorer alone, neither engine nor
accelerator, so a new one costs milliseconds. A scorer is a function of a module, which workers find
by its name, and a script that opens a pool needs the usual `if __name__ == "__main__"`. This module
imports no torch.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import queue
import resource
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any, Literal

from megatron_precision.platform.process import die_with_parent

# A response and the right answer to a reward.
Scorer = Callable[[str, str], float]
Status = Literal["scored", "timed_out", "out_of_memory", "raised", "died"]

# A report of a failed sample shows this much of a response's end, in characters.
_SHOWN_CHARACTERS = 400
# A verdict is a number and a short text; a worker that sends more has been taken over.
_LARGEST_VERDICT_BYTES = 2**16
# Importing SymPy takes seconds, on a busy machine many.
_START_LIMIT_S = 120.0
_MIB = 2**20
# Python with SymPy and what an ordinary answer needs.
_LEAST_MIB = 256


@dataclass(frozen=True)
class Sample:
    """A response to grade.

    Attributes:
        name: says which one it is in a report, for example prompt, iteration and rollout.
        response: the decoded response.
        answer: the right answer.
    """

    name: str
    response: str
    answer: str


@dataclass(frozen=True)
class Verdict:
    """The result of scoring a sample.

    Attributes:
        sample: the sample.
        reward: the scorer's number; 0.0 unless `status` is `scored`.
        status: `timed_out`, `out_of_memory` and `died` are the doing of a response; `raised` is
            a mistake in the scorer or in the right answer and wants to be looked at.
        detail: the traceback, or how the worker ended; empty where scored.
        scoring_s: seconds on a worker.
    """

    sample: Sample
    reward: float
    status: Status
    detail: str
    scoring_s: float

    def report(self) -> str:
        """Describe the sample in a paragraph: what happened, right answer, end of the response."""
        text = self.sample.response
        tail = text[-_SHOWN_CHARACTERS:]
        return (
            f"sample {self.sample.name}: {self.status.replace('_', ' ')} after "
            f"{self.scoring_s:.2f} s, reward {self.reward}\n"
            f"  right answer: {self.sample.answer[-_SHOWN_CHARACTERS:]!r}\n"
            f"  response, last {len(tail)} of {len(text)} characters: {tail!r}\n"
            f"  {self.detail.rstrip()}"
        )


class PoolClosedError(RuntimeError):
    """A sample was given to a closed pool, or was waiting when it closed."""


class WorkerStartError(RuntimeError):
    """A worker does not start, whatever the sample."""


class ScorerPool:
    """Scores samples in worker processes; one thread per worker gives it one sample at a time."""

    def __init__(
        self,
        scorer: Scorer,
        *,
        workers: int = 1,
        time_limit_s: float = 10.0,
        memory_limit_mib: int = 2048,
    ) -> None:
        """
        Args:
            scorer: a function at the top of a module, or a `scorers.FileScorer`; called in the
                workers, which load it as they start.
            workers: processes that score at the same time.
            time_limit_s: wall-clock seconds that a sample may take.
            memory_limit_mib: address space of a worker, in MiB.

        Raises:
            ValueError: lists every argument that is out of range.
        """
        _check(scorer, workers, time_limit_s, memory_limit_mib)
        self._context = multiprocessing.get_context("forkserver")
        # Of no effect where the process has started such a server before; then a worker loads it.
        self._context.set_forkserver_preload([scorer.__module__])
        self._scorer = scorer
        self._time_limit_s = time_limit_s
        self._memory_limit_mib = memory_limit_mib
        self._waiting: queue.SimpleQueue[tuple[Sample, Future[Verdict]] | None]
        self._waiting = queue.SimpleQueue()
        self._closed = threading.Event()
        # No sample may enter, and no worker be born, behind the back of `close`. Two locks: a
        # worker's start must not keep the caller of `submit` waiting.
        self._door = threading.Lock()
        self._lock = threading.Lock()
        self._alive: set[_Worker] = set()
        # Daemons: a run that fails must not wait at its exit for samples that nobody wants.
        self._threads = [
            threading.Thread(target=self._serve, name=f"scorer-{number}", daemon=True)
            for number in range(workers)
        ]
        for thread in self._threads:
            thread.start()
        # At exit multiprocessing asks its children to end and waits for them; a hostile one may
        # never hear. What is registered last runs first.
        atexit.register(self.close)

    def submit(self, sample: Sample) -> Future[Verdict]:
        """Queue a sample and return at once, so that it is scored while the engine still samples.

        Raises:
            PoolClosedError: after `close`; the future raises it for a sample that was waiting.
            WorkerStartError: the future raises it.
        """
        future: Future[Verdict] = Future()
        with self._door:
            if self._closed.is_set():
                raise PoolClosedError(f"sample {sample.name} was given to a closed pool")
            self._waiting.put((sample, future))
        return future

    def score(self, samples: Iterable[Sample]) -> list[Verdict]:
        """Score samples on all workers; verdicts come in the samples' order.

        Raises:
            PoolClosedError, WorkerStartError: as `submit` does.
        """
        return [future.result() for future in [self.submit(sample) for sample in samples]]

    def close(self) -> None:
        """Stop the workers at once, whatever they are doing, and wait until they are gone."""
        atexit.unregister(self.close)
        with self._door:
            self._closed.set()
        with self._lock:
            for worker in self._alive:
                worker.kill()
        for _ in self._threads:
            self._waiting.put(None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> ScorerPool:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _serve(self) -> None:
        """Run one thread: it has a worker, and starts a new one whenever that is lost."""
        worker: _Worker | None = None
        while (item := self._waiting.get()) is not None:
            sample, future = item
            if not future.set_running_or_notify_cancel():
                continue
            try:
                # A worker that was killed while it had nothing to do must cost no sample.
                if worker is not None and not worker.is_alive():
                    self._end(worker)
                    worker = None
                worker = worker or self._start()
                verdict = worker.score(sample, self._time_limit_s)
                if verdict.status == "died" and self._closed.is_set():
                    raise PoolClosedError(f"the pool closed before sample {sample.name} was done")
            except Exception as error:  # a thread's boundary: the caller's future gets it
                future.set_exception(error)
                lost = True
            else:
                future.set_result(verdict)
                lost = verdict.status in ("timed_out", "out_of_memory", "died")
            if lost and worker is not None:
                self._end(worker)
                worker = None
        if worker is not None:
            self._end(worker)

    def _start(self) -> _Worker:
        with self._lock:
            if self._closed.is_set():
                raise PoolClosedError("the pool is closed")
            worker = _Worker(self._context, self._scorer, self._memory_limit_mib)
            self._alive.add(worker)
            return worker

    def _end(self, worker: _Worker) -> None:
        with self._lock:
            self._alive.discard(worker)
            worker.end()


class _Worker:
    """A worker process, seen from its owner."""

    def __init__(self, context: Any, scorer: Scorer, memory_limit_mib: int) -> None:
        ours, theirs = context.Pipe()
        self._pipe: Connection = ours
        self._process = context.Process(
            target=_work, args=(theirs, scorer, memory_limit_mib), daemon=True
        )
        self._process.start()
        # The worker's end must be its own alone: its death is seen as the end of the stream.
        theirs.close()
        self._ready = False

    def score(self, sample: Sample, limit_s: float) -> Verdict:
        """Score one sample; after `timed_out` and `died` the worker cannot be used again.

        Raises:
            WorkerStartError: when the process has not come up.
        """
        self._await_ready()
        begin = time.monotonic()

        def verdict(status: Status, detail: str, reward: float = 0.0) -> Verdict:
            return Verdict(sample, reward, status, detail, time.monotonic() - begin)

        try:
            self._pipe.send_bytes(json.dumps([sample.response, sample.answer]).encode())
            if not self._pipe.poll(limit_s):
                return verdict("timed_out", f"no answer within {limit_s:g} s; its worker is killed")
            status, detail, reward = json.loads(self._pipe.recv_bytes(_LARGEST_VERDICT_BYTES))
        except (EOFError, OSError, json.JSONDecodeError):
            # The kernel may take a moment longer to end the process than to close its pipe.
            self._process.join(1.0)
            return verdict("died", f"its worker ended with exit code {self._process.exitcode}")
        return verdict(status, detail, reward)

    def _await_ready(self) -> None:
        """Wait for the worker's start, which does not count against a sample's time."""
        if self._ready:
            return
        with contextlib.suppress(EOFError, OSError):
            if self._pipe.poll(_START_LIMIT_S):
                self._pipe.recv_bytes(_LARGEST_VERDICT_BYTES)
                self._ready = True
                return
        self._process.join(1.0)
        raise WorkerStartError(
            f"a scorer's worker did not start within {_START_LIMIT_S:g} s (exit code "
            f"{self._process.exitcode}): its standard error says why"
        )

    def is_alive(self) -> bool:
        """Say whether an idle worker still runs: it writes nothing unless it ends."""
        return not self._pipe.poll()

    def kill(self) -> None:
        """Kill the process; its thread sees the stream end."""
        self._process.kill()

    def end(self) -> None:
        """Kill the process, wait until it is gone, and close its streams."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self._pipe.close()


def _work(pipe: Connection, scorer: Scorer, memory_limit_mib: int) -> None:
    """Run a worker's process: score samples until the stream ends."""
    _die_with_owner()
    # Ctrl-C goes to the whole terminal; the owner decides when its workers end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limit = memory_limit_mib * _MIB
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    pipe.send_bytes(b"ready")
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            response, answer = json.loads(pipe.recv_bytes())
            pipe.send_bytes(json.dumps(_attempt(scorer, response, answer)).encode())


def _die_with_owner() -> None:
    """End this process with the server that forked it, and that server with the owner.

    The server ends when every copy of a pipe is closed, of which each worker is given one: an
    endless worker would keep the server alive, and the server would keep the worker.
    """
    die_with_parent()
    server = vars(multiprocessing.forkserver)["_forkserver"]
    os.close(vars(server)["_forkserver_alive_fd"])


def _attempt(scorer: Scorer, response: str, answer: str) -> tuple[Status, str, float]:
    """Score one sample; an error becomes the verdict's status and detail."""
    try:
        reward = scorer(response, answer)
        if isinstance(reward, bool) or not isinstance(reward, int | float):
            raise TypeError(f"the scorer returned {reward!r}, expected a number")
        if not math.isfinite(reward):
            raise ValueError(f"the scorer returned {reward}, expected a finite number")
    except MemoryError:
        return "out_of_memory", "it needed more memory than a worker may have", 0.0
    except Exception:  # a process's boundary: its owner reports it
        # The end names the error; a deep recursion has a very long beginning.
        return "raised", traceback.format_exc()[-4096:], 0.0
    return "scored", "", float(reward)


def _check(scorer: Scorer, workers: int, time_limit_s: float, memory_limit_mib: int) -> None:
    wrong = []
    try:
        pickle.dumps(scorer)  # by its name: workers load it themselves
    except (pickle.PicklingError, AttributeError, TypeError):
        wrong.append(f"scorer: got {scorer!r}, expected a function at the top of a module")
    if workers < 1:
        wrong.append(f"workers: got {workers}, expected 1 or more")
    if not 0 < time_limit_s < math.inf:
        wrong.append(f"time_limit_s: got {time_limit_s}, expected seconds above 0")
    if memory_limit_mib < _LEAST_MIB:
        wrong.append(f"memory_limit_mib: got {memory_limit_mib}, expected {_LEAST_MIB} or more")
    if wrong:
        raise ValueError("cannot open a scorer pool; " + "; ".join(wrong))
