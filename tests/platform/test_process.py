"""Jobs end whole: processes are found by the job's id and removed with their shared memory."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_precision.config.errors import Problem, UserError
from megatron_precision.platform import process

SLEEP = "import time; time.sleep(60)"
STUBBORN = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('ready', flush=True); time.sleep(60)"
)


@pytest.fixture
def job() -> Iterator[str]:
    name = process.new_job_id()
    yield name
    process.end_job(name, grace_s=0.0)


def start(job: str, code: str) -> subprocess.Popen[bytes]:
    environment = {**os.environ, process.JOB_VARIABLE: job}
    return subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE)


def wait_until_gone(pid: int, timeout_s: float = 10.0) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.05)
    return False


def test_job_ids_are_unique_and_found_in_names() -> None:
    one, two = process.new_job_id(), process.new_job_id()
    assert one != two
    for job in (one, "mpjob-123-456"):
        assert process.job_of(Path(f"/dev/shm/-tp:0-[0-1]-cpushm-{job}_1")) == job


def test_ranks_of_one_torchrun_adopt_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(process.JOB_VARIABLE, raising=False)
    code = "from megatron_precision.platform import process; print(process.adopt_job())"
    names = {subprocess.check_output([sys.executable, "-c", code], text=True) for _ in range(2)}
    assert len(names) == 1
    assert process.is_alive(names.pop().strip())
    assert not process.is_alive(f"{process.JOB_PREFIX}{os.getpid()}-0")


def test_a_job_ends_with_its_memory_and_no_other_job_is_touched(job: str) -> None:
    other = process.new_job_id()
    mine, stubborn, theirs = start(job, SLEEP), start(job, STUBBORN), start(other, SLEEP)
    assert stubborn.stdout is not None
    stubborn.stdout.readline()
    names = {name: process.SHARED_MEMORY / f"-tp:0-{name}_1" for name in (job, other)}
    for path in names.values():
        path.touch()
    try:
        assert sorted(process.end_job(job, grace_s=0.5)) == sorted([mine.pid, stubborn.pid])
        assert mine.wait() == -signal.SIGTERM
        assert stubborn.wait() == -signal.SIGKILL
        assert not names[job].exists()
        assert names[other].exists()
        assert theirs.poll() is None
        assert process.is_alive(other)
    finally:
        process.end_job(other)
        theirs.wait()


def test_a_guard_ends_the_job_when_its_owner_is_killed(job: str, tmp_path: Path) -> None:
    # The owner starts a guard and a member of the job, and is then killed without a chance.
    code = (
        "import os, subprocess, sys, time\n"
        "from megatron_precision.platform import process\n"
        f"job = {job!r}\n"
        "guard = process.Guard(job)\n"
        f"member = subprocess.Popen([sys.executable, '-c', {SLEEP!r}],\n"
        "    env={**os.environ, process.JOB_VARIABLE: job}, start_new_session=True,\n"
        "    stdout=subprocess.DEVNULL)\n"
        "print(member.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert owner.stdout is not None
    member = int(owner.stdout.readline())
    segment = process.SHARED_MEMORY / f"test-{job}"
    segment.touch()
    owner.kill()
    owner.wait()
    assert wait_until_gone(member)
    deadline = time.monotonic() + 10.0
    while segment.exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not segment.exists()


def test_a_rank_dies_with_its_parent() -> None:
    child = (
        "import time\n"
        "from megatron_precision.platform import process\n"
        "process.die_with_parent()\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    code = (
        "import subprocess, sys\n"
        f"child = subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.PIPE)\n"
        "child.stdout.readline()\n"
        "print(child.pid, flush=True)\n"
        "child.wait()\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    assert wait_until_gone(pid)


def test_the_first_failure_is_the_earliest_one(tmp_path: Path) -> None:
    assert process.first_failure(tmp_path) is None

    def fail(message: str) -> RuntimeError:
        try:
            raise RuntimeError(message)
        except RuntimeError as error:
            return error

    process.record_failure(tmp_path, 11, fail("the original reason"))
    time.sleep(0.01)
    process.record_failure(tmp_path, 0, fail("connection closed by peer"))
    first = process.first_failure(tmp_path)
    assert first is not None
    assert (first.rank, first.user_error) == (11, False)
    assert first.text.startswith("Traceback")
    assert "the original reason" in first.text
    assert "in fail" in first.text


def test_half_a_record_hides_no_other(tmp_path: Path) -> None:
    process.record_failure(tmp_path, 1, UserError(Problem("no", "here", "this", "that")))
    (tmp_path / "errors" / "rank0.txt").write_text("rank 0 tim", encoding="utf-8")
    first = process.first_failure(tmp_path)
    assert first is not None
    assert (first.rank, first.user_error) == (1, True)
    assert first.text.startswith("error: no")
