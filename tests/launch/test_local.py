"""Jobs through nemo-run: exit codes, the original traceback, and nothing left behind.

The job is `launch_jobs/tiny_job.py`, two real processes under a real torchrun without an engine.
Deaths inside a collective of the engines are not covered here.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_precision.config.errors import UserError
from megatron_precision.launch import local
from megatron_precision.launch.jobs import Job
from megatron_precision.launch.log import Death, describe_failure, first_death
from megatron_precision.platform import process

TESTS = Path(__file__).resolve().parents[1]
CODE = """
import sys
from pathlib import Path
from megatron_precision.launch.jobs import Job
from megatron_precision.launch.local import run_job
out = Path(sys.argv[2])
job = Job(sys.argv[1], ("--out", str(out)), 2, out, module="tiny_job")
sys.exit(run_job(job))
"""


def launch(ending: str, out: Path) -> subprocess.Popen[str]:
    python_path = os.pathsep.join([str(TESTS.parent), str(TESTS / "launch_jobs")])
    environment = {**os.environ, "PYTHONPATH": python_path}
    environment.pop("NEMORUN_HOME", None)
    return subprocess.Popen(
        [sys.executable, "-c", CODE, ending, str(out)],
        env=environment,
        cwd=TESTS.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_ranks(out: Path) -> list[int]:
    paths = [out / f"segment{rank}" for rank in (0, 1)]
    deadline = time.monotonic() + 300.0
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.1)
    return [int((out / f"pid{rank}").read_text(encoding="ascii")) for rank in (0, 1)]


def is_running(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def assert_nothing_left(out: Path, pids: list[int], timeout_s: float = 0.0) -> None:
    def left() -> list[object]:
        names = [(out / f"segment{rank}").read_text(encoding="ascii") for rank in (0, 1)]
        segments = [process.SHARED_MEMORY / name for name in names]
        segments += [Path((out / f"named{rank}").read_text(encoding="utf-8")) for rank in (0, 1)]
        return [pid for pid in pids if is_running(pid)] + [p for p in segments if p.exists()]

    deadline = time.monotonic() + timeout_s
    while left() and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left() == []


@pytest.mark.parametrize(
    ("ending", "code", "first_line"),
    [
        ("raise", 1, "rank 1 failed first:"),
        pytest.param("succeed", 0, "", marks=pytest.mark.slow),
        pytest.param(
            "kill",
            1,
            "rank 1 was killed by SIGKILL; it could leave no traceback.",
            marks=pytest.mark.slow,
        ),
        pytest.param("refuse", 2, "error: not allowed", marks=pytest.mark.slow),
    ],
)
def test_the_exit_code_and_the_reason_are_the_jobs(
    tmp_path: Path, ending: str, code: int, first_line: str
) -> None:
    job = launch(ending, tmp_path)
    pids = wait_for_ranks(tmp_path)
    stdout, stderr = job.communicate(timeout=300)
    assert job.returncode == code
    assert stdout.splitlines()[0] == "hello from rank 0"
    assert "hello from rank 1" not in stdout
    shown = [line for line in stderr.splitlines() if not line.startswith("=")]
    assert (shown[0] if shown else "") == first_line
    if ending == "raise":
        assert "RuntimeError: the original reason" in stderr
    assert_nothing_left(tmp_path, pids)


@pytest.mark.parametrize(
    ("number", "ending"),
    [
        (signal.SIGINT, "hang"),
        pytest.param(signal.SIGTERM, "hang", marks=pytest.mark.slow),
        pytest.param(signal.SIGHUP, "hang", marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, "stubborn", marks=pytest.mark.slow),
    ],
)
def test_a_signal_stops_the_job_and_is_told_by_the_exit_code(
    tmp_path: Path, number: signal.Signals, ending: str
) -> None:
    job = launch(ending, tmp_path)
    pids = wait_for_ranks(tmp_path)
    job.send_signal(number)
    _, stderr = job.communicate(timeout=300)
    assert job.returncode == 128 + number
    assert f"stopped by {number.name}" in stderr
    assert_nothing_left(tmp_path, pids)


@pytest.mark.slow
def test_a_killed_launcher_leaves_nothing_behind(tmp_path: Path) -> None:
    job = launch("hang", tmp_path)
    pids = wait_for_ranks(tmp_path)
    job.kill()
    job.communicate()
    assert_nothing_left(tmp_path, pids, timeout_s=20.0)


def test_a_folder_that_the_launcher_would_garble_is_refused() -> None:
    job = Job("train", ("--out", "runs/my run"), 2, Path("runs/my run"))
    with pytest.raises(UserError, match="cannot carry") as caught:
        local.run_job(job)
    assert "runs/my run" in str(caught.value)


def test_a_lock_is_held_by_one_at_a_time(tmp_path: Path) -> None:
    path = tmp_path / "runs" / "x.lock"
    with (
        local.exclusive(path),
        pytest.raises(UserError, match="another run"),
        local.exclusive(path),
    ):
        pass
    with local.exclusive(path):
        pass


def test_torchruns_summary_names_the_rank_that_was_killed(tmp_path: Path) -> None:
    log = tmp_path / "job" / "0" / "combined.log"
    log.parent.mkdir(parents=True)
    log.write_text(
        "[default0]:an ordinary line\n"
        "Root Cause (first observed failure):\n[0]:\n  time      : 2025-01-01_00:00:00\n"
        "  host      : localhost\n  rank      : 3 (local_rank: 1)\n"
        "  exitcode  : -9 (pid: 4242)\n  error_file: <N/A>\n",
        encoding="utf-8",
    )
    assert first_death(tmp_path) == Death(3, 1, -9)
    assert "rank 3 was killed by SIGKILL" in describe_failure(tmp_path, tmp_path)


def test_of_ranks_found_dead_together_the_killed_one_is_the_cause(tmp_path: Path) -> None:
    def failed(rank: int, code: int) -> str:
        return f"  rank      : {rank} (local_rank: {rank})\n  exitcode  : {code} (pid: 42)\n"

    log = tmp_path / "combined.log"
    for killed, code in ((1, -9), (2, -6)):
        others = "".join(failed(rank, code if rank == killed else -15) for rank in (1, 2))
        log.write_text(
            f"x FAILED\n---\nFailures:\n{others}---\n"
            f"Root Cause (first observed failure):\n{failed(0, 1)}===\n",
            encoding="utf-8",
        )
        assert first_death(tmp_path) == Death(killed, killed, code)


def test_a_rank_that_was_told_to_stop_is_no_failure(tmp_path: Path) -> None:
    log = tmp_path / "log-x.train_7_0.err"
    log.write_text(
        "Root Cause (first observed failure):\n  rank      : 0 (local_rank: 0)\n"
        "  exitcode  : 75 (pid: 4242)\n",
        encoding="utf-8",
    )
    assert "rank 0 was told to stop; --resume goes on" in describe_failure(tmp_path, tmp_path)


def test_a_rank_that_died_before_it_could_record_is_shown_by_its_log(tmp_path: Path) -> None:
    log = tmp_path / "combined.log"
    log.write_text(
        "Root Cause (first observed failure):\n  rank      : 1 (local_rank: 1)\n"
        "  exitcode  : 1 (pid: 4242)\n",
        encoding="utf-8",
    )
    stderr = tmp_path / "x" / "attempt_0" / "1" / "stderr.log"
    stderr.parent.mkdir(parents=True)
    stderr.write_text("ImportError: no such engine\n", encoding="utf-8")
    text = describe_failure(tmp_path, tmp_path)
    assert "rank 1 ended with exit code 1" in text
    assert "ImportError: no such engine" in text
