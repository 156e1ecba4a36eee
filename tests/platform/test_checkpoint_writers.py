"""Results of forked checkpoint writers come back, and no process is left that held them."""

from __future__ import annotations

import multiprocessing
import os
import queue
import subprocess
import sys

import pytest

from megatron_precision.platform import checkpoint_writers


def test_what_a_forked_writer_puts_is_there_when_it_has_ended() -> None:
    results = checkpoint_writers.Results()
    large = list(range(100_000))
    writer = multiprocessing.get_context("fork").Process(target=results.put, args=({0: large},))
    writer.start()
    # Megatron's order. The result is larger than a pipe: a writer that nobody reads never ends.
    writer.join(timeout=60.0)
    assert writer.exitcode == 0
    assert results.get_nowait() == {0: large}
    results.put({1: ["of this process"]})
    assert results.get_nowait() == {1: ["of this process"]}


def test_a_process_that_has_taken_results_ends_without_a_word() -> None:
    lines = (
        "from megatron_precision.platform.checkpoint_writers import Results",
        "results = Results()",
        "results.put(1)",
        "assert results.get_nowait() == 1",
    )
    for _ in range(3):  # what is closed first as a process ends is a matter of luck
        done = subprocess.run(
            [sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_writer_that_died_leaves_nothing_to_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_writers, "_PATIENCE_S", 0.2)
    results = checkpoint_writers.Results()
    writer = multiprocessing.get_context("fork").Process(
        target=os.kill, args=(os.getpid(), 0), daemon=True
    )
    writer.start()
    writer.join()
    with pytest.raises(queue.Empty):
        results.get_nowait()


def test_the_patched_name_is_upstreams_and_gives_one_queue_a_process() -> None:
    (patch,) = checkpoint_writers.PATCHES
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    assert callable(getattr(filesystem_async, patch.attribute))
    made = patch.make(filesystem_async._get_write_results_queue)
    assert made() is made()
    assert not multiprocessing.active_children()
