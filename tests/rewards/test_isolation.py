"""Scoring in workers that can be killed: what a hostile response costs, and what it does not.

Not covered: a response that takes over its worker and does harm as the same user.
"""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest

from megatron_precision.rewards.isolation import (
    PoolClosedError,
    Sample,
    ScorerPool,
    Verdict,
    WorkerStartError,
)
from tests.rewards import hostile_scorers

ROOT = Path(__file__).resolve().parents[2]
TESTS = Path(__file__).resolve().parent
# Longer than a start under load, and than any sample here that is meant to be scored.
PATIENCE_S = 30.0


@pytest.fixture(scope="module")
def obedient() -> Iterator[ScorerPool]:
    """One worker, so that what a sample leaves behind meets the next."""
    with ScorerPool(hostile_scorers.obey, time_limit_s=2.0, memory_limit_mib=1024) as pool:
        yield pool


def do(pool: ScorerPool, *deeds: str) -> list[Verdict]:
    return pool.score(Sample(f"{number} {deed}", deed, "") for number, deed in enumerate(deeds))


def read_pid(path: Path) -> int:
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists():
        assert time.monotonic() < deadline, "no worker has begun"
        time.sleep(0.02)
    return int(path.read_text(encoding="ascii"))


def is_gone(pid: int, within_s: float = 10.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.02)
    return False


@pytest.mark.parametrize(
    ("deed", "status", "words"),
    [
        ("loop", "timed_out", "within 2 s"),
        ("power", "timed_out", "within 2 s"),
        ("memory", "out_of_memory", "more memory"),
        ("kill", "died", "-9"),
        ("exit", "died", "exit code 7"),
        ("raise", "raised", "LookupError: this scorer has a bug"),
        ("recurse", "raised", "RecursionError"),
        ("end of file", "raised", "EOFError: no more input"),
        ("nan", "raised", "returned nan, expected a finite number"),
        ("text", "raised", "returned '1.0', expected a number"),
        ("true", "raised", "returned True, expected a number"),
    ],
)
def test_a_hostile_sample_costs_its_own_reward_and_no_other(
    obedient: ScorerPool, deed: str, status: str, words: str
) -> None:
    before, hostile, after = do(obedient, "one", deed, "one")
    assert (before.reward, before.status) == (1.0, "scored")
    assert (hostile.reward, hostile.status) == (0.0, status)
    assert words in hostile.detail
    assert (after.reward, after.status) == (1.0, "scored")


def test_a_limit_is_of_one_sample_and_not_of_those_before_it() -> None:
    with ScorerPool(hostile_scorers.process_id, time_limit_s=3.0) as pool:
        verdicts = pool.score(Sample(str(n), "0.8", "") for n in range(5))
    assert [v.status for v in verdicts] == ["scored"] * 5
    assert all(0.8 <= v.scoring_s < 3.0 for v in verdicts)


def test_a_scorer_that_raises_is_reported_with_its_sample(obedient: ScorerPool) -> None:
    response = "raise"
    (verdict,) = obedient.score([Sample("prompt 3, rollout 5", response, "")])
    report = verdict.report()
    assert report.startswith("sample prompt 3, rollout 5: raised after ")
    assert "in _raise" in report
    assert "LookupError: this scorer has a bug" in report
    assert "'raise'" in report


def test_a_report_shows_the_end_of_a_long_response() -> None:
    sample = Sample("7", "a" * 5000 + "the end", "42")
    report = Verdict(sample, 0.0, "timed_out", "killed", 10.0).report()
    assert "the end'" in report
    assert "'42'" in report
    assert "last 400 of 5007 characters" in report
    assert len(report) < 700


def test_a_timed_out_worker_is_gone(obedient: ScorerPool, tmp_path: Path) -> None:
    path = tmp_path / "pid"
    (verdict,) = obedient.score([Sample("endless", "loop", str(path))])
    assert verdict.status == "timed_out"
    assert is_gone(read_pid(path), within_s=0.5)


def test_a_worker_killed_while_idle_costs_no_sample() -> None:
    with ScorerPool(hostile_scorers.process_id) as pool:
        (first,) = pool.score([Sample("first", "0", "")])
        os.kill(int(first.reward), signal.SIGKILL)
        assert is_gone(int(first.reward))
        (second,) = pool.score([Sample("second", "0", "")])
    assert second.status == "scored"
    assert second.reward not in (0.0, first.reward)


def test_verdicts_keep_the_samples_order_and_one_slow_sample_holds_up_no_other() -> None:
    waits = ["1.5", *["0.01"] * 12]
    with ScorerPool(hostile_scorers.process_id, workers=2) as pool:
        pool.score([Sample("warm", "0.3", ""), Sample("warm", "0.3", "")])
        verdicts = pool.score(Sample(str(n), wait, "") for n, wait in enumerate(waits))
    assert [v.sample.name for v in verdicts] == [str(n) for n in range(13)]
    slow, *quick = (v.reward for v in verdicts)
    assert len(set(quick)) == 1
    assert slow not in quick


def test_every_worker_works() -> None:
    with ScorerPool(hostile_scorers.process_id, workers=3) as pool:
        verdicts = pool.score(Sample(str(n), "0.4", "") for n in range(12))
    assert len({v.reward for v in verdicts}) == 3
    assert os.getpid() not in {v.reward for v in verdicts}


@pytest.mark.parametrize("text", ["x" * 40_000_000, "π" * 1_000_000, "\ud800half a pair", ""])
def test_a_response_arrives_whole(text: str) -> None:
    with ScorerPool(hostile_scorers.length) as pool:
        (verdict,) = pool.score([Sample("long", text, "")])
    assert (verdict.reward, verdict.status) == (float(len(text)), "scored")


def test_a_response_larger_than_a_worker_may_be_costs_its_reward() -> None:
    with ScorerPool(hostile_scorers.length, memory_limit_mib=256) as pool:
        huge, small = pool.score([Sample("huge", "x" * 150_000_000, ""), Sample("small", "x", "")])
    assert (huge.reward, huge.status) == (0.0, "died")
    assert (small.reward, small.status) == (1.0, "scored")


def test_closing_ends_endless_workers_at_once_and_refuses_what_waits(tmp_path: Path) -> None:
    pool = ScorerPool(hostile_scorers.obey, time_limit_s=600.0)
    path = tmp_path / "pid"
    futures: list[Future[Verdict]] = [pool.submit(Sample("endless", "loop", str(path)))]
    futures += [pool.submit(Sample(f"waiting {n}", "one", "")) for n in range(3)]
    pid = read_pid(path)
    begin = time.monotonic()
    pool.close()
    assert time.monotonic() - begin < 5.0
    assert is_gone(pid, within_s=0.5)
    for future in futures:
        with pytest.raises(PoolClosedError):
            future.result(timeout=1.0)
    with pytest.raises(PoolClosedError, match="late"):
        pool.submit(Sample("late", "one", ""))
    pool.close()


def test_a_sample_that_was_cancelled_while_it_waited_is_not_scored(tmp_path: Path) -> None:
    path = tmp_path / "pid"
    with ScorerPool(hostile_scorers.obey, time_limit_s=1.0) as pool:
        endless = pool.submit(Sample("endless", "loop", ""))
        unwanted = pool.submit(Sample("unwanted", "one", str(path)))
        assert unwanted.cancel()
        assert endless.result(PATIENCE_S).status == "timed_out"
        assert do(pool, "one")[0].reward == 1.0
    assert not path.exists()


OWNER = """
import sys, time
import hostile_scorers
from megatron_precision.rewards.isolation import Sample, ScorerPool

if __name__ == "__main__":
    pool = ScorerPool(hostile_scorers.obey, workers=2, time_limit_s=600.0)
    for name in ("one", "other"):
        pool.submit(Sample(name, "loop", sys.argv[1] + name))
    pool.submit(Sample("waiting", "one", ""))
    {end}
"""


def start_owner(folder: Path, end: str) -> tuple[subprocess.Popen[bytes], list[int]]:
    script = folder / "owner.py"
    script.write_text(OWNER.format(end=end), encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(TESTS)])}
    command = [sys.executable, str(script), str(folder / "pid-")]
    owner = subprocess.Popen(command, env=environment)
    try:
        return owner, [read_pid(folder / f"pid-{name}") for name in ("one", "other")]
    except BaseException:
        owner.kill()
        raise


def test_endless_workers_die_when_their_owner_is_killed(tmp_path: Path) -> None:
    owner, pids = start_owner(tmp_path, "time.sleep(600)")
    owner.kill()
    owner.wait()
    assert all(is_gone(pid) for pid in pids)


def test_an_owner_that_fails_ends_at_once_and_takes_its_workers_along(tmp_path: Path) -> None:
    wait = "import os\n    while not os.path.exists(sys.argv[1] + 'go'): time.sleep(0.02)"
    owner, pids = start_owner(tmp_path, f"{wait}\n    raise SystemExit(3)")
    (tmp_path / "pid-go").touch()
    assert owner.wait(timeout=20.0) == 3
    assert all(is_gone(pid) for pid in pids)


def test_a_worker_that_cannot_start_is_an_error_and_no_reward(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "scorer_that_goes.py"
    source.write_text("def score(response, answer):\n    return 1.0\n", encoding="ascii")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module(source.stem)
    source.unlink()
    with ScorerPool(module.score) as pool, pytest.raises(WorkerStartError, match="exit code 1"):
        pool.score([Sample("any", "x", "")])


def test_every_argument_out_of_range_is_listed() -> None:
    with pytest.raises(ValueError, match="cannot open a scorer pool") as error:
        ScorerPool(lambda *_: 1.0, workers=0, time_limit_s=float("nan"), memory_limit_mib=0)
    for name in ("scorer: got <function", "workers: got 0", "time_limit_s: got nan", "mib: got 0"):
        assert name in str(error.value)
