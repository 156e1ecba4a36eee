"""A rank that hangs is named: by hand, and with real processes that are stopped.

Not covered: a rank stuck with the interpreter's lock held, which looks to its peers like one that
is stopped.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_precision.train.watchdog import Post, missing_ranks
from tests.distributed.harness import run_distributed


def test_ranks_that_are_silent_behind_or_never_began_are_named_and_others_are_not() -> None:
    before = [Post(9, 7, 2, "sync"), Post(8, 6, 2, "train"), Post(5, 7, 2, "sync"), None]
    before.append(Post(4, 7, 2, "sync"))
    after = [Post(14, 7, 2, "sync"), Post(13, 6, 2, "train"), Post(5, 7, 2, "sync"), None]
    after.append(Post(9, 8, 2, "other"))  # ahead: nobody waits for it
    assert missing_ranks(before, after, own=0) == [
        "rank 1: behind, in train of iteration 2",
        "rank 2: no sign of life; last in sync of iteration 2",
        "rank 3: posted nothing",
    ]


def test_where_all_live_in_the_same_phase_nobody_is_accused() -> None:
    before = [Post(1, 7, 2, "train"), Post(1, 7, 2, "train")]
    after = [Post(6, 7, 2, "train"), Post(6, 7, 2, "train")]
    (line,) = missing_ranks(before, after, own=1)
    assert line.startswith("every rank lives")


@pytest.mark.parametrize("stopped", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_stopped_rank_is_named_by_its_peer(stopped: int, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="7"):
        run_distributed("watchdog_bodies.one_stops", 2, stopped, str(tmp_path), timeout_s=120)
    (said,) = tmp_path.glob("rank*.txt")
    assert said.name == f"rank{1 - stopped}.txt"
    text = said.read_text(encoding="utf-8")
    assert text.startswith("sync of iteration 3 took longer than its 6 s (watchdog.sync_s)\n")
    assert f"rank {stopped}: no sign of life; last in other of iteration 3\n" in text
    assert "watchdog_bodies.py" in text  # where the peer waited


@pytest.mark.slow
def test_a_slow_phase_ends_at_its_own_limit_and_one_without_a_limit_does_not(
    tmp_path: Path,
) -> None:
    within, said = run_distributed("watchdog_bodies.all_are_slow", 2, str(tmp_path))
    assert within == "True"
    assert said.startswith("train of iteration 0 took longer than its 1 s (watchdog.train_s)\n")
    assert "every rank lives and is in this phase" in said
