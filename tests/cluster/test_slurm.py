"""Jobs through a real Slurm with two node daemons: results, logs, exit codes, ends and restarts.

The endings are those of `launch_jobs/tiny_job.py`, real ranks without an engine; the last two
tests train the tiny recipe. Not covered: GPUs, containers, a network between machines, accounting,
and a pre-emption by Slurm itself (its signal is sent by hand).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_precision.cli import launch as launcher
from megatron_precision.platform import process
from tests.cluster import chat_run
from tests.e2e import real_jobs

pytestmark = pytest.mark.slow

TESTS = Path(__file__).resolve().parents[1]
SECRET = "sesame-4711"
LAUNCHES = {
    "succeed": "succeed --nodes 2 --gpus-per-node 1",
    "raise": "raise --retries 1 --restarts 3 --nodes 1",
    "refuse": "refuse --retries 3 --restarts 3 --nodes 1",
    "kill": "kill --nodes 1",
    "again": "again --restarts 2 --nodes 1",
    "array": "again --array 3 --nodes 1",
    "refused_array": "refuse --array 3 --retries 1 --nodes 1",
    "cancelled": "hang --restarts 2 --nodes 1",
    "interrupted": "hang --restarts 2 --nodes 1",
    "secrets": "secrets --env NAMED_SECRET --nodes 2",
}
TWO_NODES = ["--executor", "slurm", "--nodes", "2", "--gpus-per-node", "1", "--time", "20"]
PATIENCE_S = 540.0


class Ended:
    """What one launch left."""

    def __init__(self, folder: Path) -> None:
        self.out = folder / "out"
        self.stdout = (folder / "stdout").read_text(encoding="utf-8")
        self.stderr = (folder / "stderr").read_text(encoding="utf-8")
        self.code = int((folder / "code").read_text(encoding="ascii"))
        self.shown = [line for line in self.stderr.splitlines() if not line.startswith("=")]

    @property
    def number(self) -> str:
        return number_in(self.stdout)

    def log(self, pattern: str) -> str:
        (path,) = self.out.glob(f"launcher/experiments/*/*/*/{pattern}")
        return path.read_text(encoding="utf-8")


def number_in(stdout: str) -> str:
    found = re.search(r"slurm job (\d+): ", stdout)
    return found[1] if found else ""


def wait_until(happened: Callable[[], Any]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not happened():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.2)


def wait_for_ranks(folder: Path) -> str:
    """Until both ranks of a launch have started; returns Slurm's number of it."""
    wait_until(lambda: all((folder / "out" / f"segment{rank}").exists() for rank in (0, 1)))
    wait_until(lambda: number_in((folder / "stdout").read_text(encoding="utf-8")))
    return number_in((folder / "stdout").read_text(encoding="utf-8"))


def step_of_task(cluster: Any, folder: Path) -> str:
    """The step that is torchrun of the task of an array that runs, once its ranks have started.

    `scancel` tells a whole task twice, and complains the second time.
    """
    records = cluster.run("scontrol", "-o", "show", "job", wait_for_ranks(folder)).splitlines()
    (running,) = [record for record in records if "JobState=RUNNING" in record]
    return re.findall(r"\bJobId=(\d+)", running)[0] + ".1"  # step 0 asked for the address


@pytest.fixture(scope="module")
def ended(cluster: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Ended]:
    """All launches, at once; what has to be stopped is stopped as soon as it runs."""
    folder = tmp_path_factory.mktemp("launches")
    site = folder / "site.toml"
    # Several jobs on a node, so that they need not wait for each other.
    site.write_text('partition = "batch"\ntime = "20"\n[slurm]\nexclusive = false\n')
    environment = {
        **real_jobs.environment(TESTS / "launch_jobs"), **cluster.environment,
        "NAMED_SECRET": SECRET, "OTHER_SECRET": SECRET,
    }  # fmt: skip
    lines = [f"{name} {line} --site {site}" for name, line in LAUNCHES.items()]
    command = [sys.executable, str(TESTS / "launch_jobs" / "launch_on_slurm.py"), str(folder)]
    with open(folder / "log", "w") as log:
        launches = subprocess.Popen(
            [*command, *lines], env=environment, cwd=folder, stdout=log, stderr=log
        )
        try:
            # What Slurm does before the time limit: the steps are told, the script is not.
            cluster.run("scancel", "--signal=TERM", wait_for_ranks(folder / "again"))
            cluster.run("scancel", "--signal=TERM", step_of_task(cluster, folder / "array"))
            cluster.run("scancel", wait_for_ranks(folder / "cancelled"))
            wait_for_ranks(folder / "interrupted")
            pid = int((folder / "interrupted" / "pid").read_text(encoding="ascii"))
            os.kill(pid, signal.SIGINT)
            launches.wait(PATIENCE_S)
        finally:
            launches.kill()
            launches.wait()
    return {name: Ended(folder / name) for name in LAUNCHES}


@pytest.mark.parametrize(
    ("name", "code", "slurm_code"),
    [("succeed", 0, "0:0"), ("raise", 1, "1:0"), ("refuse", 2, "2:0"), ("kill", 1, "1:0"),
     ("again", 0, "0:0"), ("cancelled", 143, "0:15"), ("interrupted", 130, "0:15")],
)  # fmt: skip
def test_the_exit_code_is_the_jobs(
    ended: dict[str, Ended], cluster: Any, name: str, code: int, slurm_code: str
) -> None:
    assert ended[name].code == code, ended[name].stdout + ended[name].stderr
    assert f"ExitCode={slurm_code} " in cluster.run(
        "scontrol", "-o", "show", "job", ended[name].number
    )


@pytest.mark.parametrize(
    ("name", "first_line"),
    [
        ("raise", "rank 1 failed first:"),
        ("refuse", "error: not allowed"),
        ("kill", "rank 1 was killed by SIGKILL; it could leave no traceback."),
    ],
)
def test_the_reason_is_the_first_thing_shown(
    ended: dict[str, Ended], name: str, first_line: str
) -> None:
    assert ended[name].shown[0] == first_line
    assert ("RuntimeError: the original reason" in ended[name].stderr) == (name == "raise")


def test_the_reason_is_the_last_thing_in_the_jobs_own_log(ended: dict[str, Ended]) -> None:
    *_, last = ended["raise"].log("sbatch_*.out").strip().splitlines()
    assert last == "RuntimeError: the original reason"
    assert "error: not allowed" in ended["refuse"].log("sbatch_*.out")


def test_lines_of_the_first_rank_are_shown_as_they_come(ended: dict[str, Ended]) -> None:
    lines = ended["succeed"].stdout.splitlines()
    number = ended["succeed"].number
    assert "hello from rank 0" in lines
    assert lines.index(f"slurm job {number}: running") < lines.index("hello from rank 0")
    assert lines[-1] == f"slurm job {number}: completed"


def test_a_job_that_was_told_to_stop_is_started_again(
    ended: dict[str, Ended], cluster: Any
) -> None:
    record = cluster.run("scontrol", "-o", "show", "job", ended["again"].number)
    assert "JobState=COMPLETED" in record
    assert "Restarts=1" in record


def test_a_job_that_failed_is_started_again_as_often_as_retries_say(
    ended: dict[str, Ended], cluster: Any
) -> None:
    assert "Restarts=1 " in cluster.run("scontrol", "-o", "show", "job", ended["raise"].number)
    # Each failure keeps its own reason.
    kept = ended["raise"].out / f"errors.before-{ended['raise'].number}-1"
    assert "the original reason" in (kept / "rank1.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "code", "states"),
    [
        ("array", 0, {"1": "FAILED", "2": "COMPLETED", "3": "CANCELLED"}),
        # Tasks that were one record until they were cancelled have no number.
        ("refused_array", 2, {"1": "FAILED", str(2**32 - 2): "CANCELLED"}),
    ],
)
def test_the_tasks_of_an_array_go_on_one_after_another_while_there_is_something_to_do(
    ended: dict[str, Ended], cluster: Any, name: str, code: int, states: dict[str, str]
) -> None:
    assert ended[name].code == code, ended[name].stdout + ended[name].stderr
    found = {}
    for record in cluster.run("scontrol", "-o", "show", "job", ended[name].number).splitlines():
        (task,) = re.findall(r"ArrayTaskId=(\d+)", record)
        (found[task],) = re.findall(r"JobState=(\w+)", record)
    assert found == states
    lines = ended[name].stdout.splitlines()
    assert lines.count("hello from rank 0") == sum(s != "CANCELLED" for s in states.values())
    assert (f"slurm job {ended[name].number}: running, start 2" in lines) == (name == "array")


@pytest.mark.parametrize("name", ["refuse", "cancelled", "interrupted"])
def test_neither_a_users_mistake_nor_a_cancelled_job_is_started_again(
    ended: dict[str, Ended], cluster: Any, name: str
) -> None:
    assert "Restarts=0 " in cluster.run("scontrol", "-o", "show", "job", ended[name].number)


def test_an_interrupted_launch_says_that_it_cancelled_the_job(ended: dict[str, Ended]) -> None:
    number = ended["interrupted"].number
    assert ended["interrupted"].shown[-1] == f"stopped by SIGINT; cancelled slurm jobs: {number}"
    assert f"slurm job {ended['cancelled'].number} was cancelled" in ended["cancelled"].stderr


def test_a_variable_reaches_the_ranks_by_its_name_alone(ended: dict[str, Ended]) -> None:
    out = ended["secrets"].out
    assert (out / "NAMED_SECRET").read_text() == "True"
    assert (out / "OTHER_SECRET").read_text() == "False"
    for path in out.parent.parent.rglob("*"):
        if path.is_file():
            assert SECRET.encode() not in path.read_bytes(), path


def test_nothing_is_left_of_a_job_that_ended_by_itself(ended: dict[str, Ended]) -> None:
    # Slurm may kill the guard of a job that it stops before that has removed the shared memory.
    stopped = ("again", "array", "cancelled", "interrupted")

    def left() -> list[Path]:
        paths = []
        for out in (launch.out for name, launch in ended.items() if name not in stopped):
            for rank in (0, 1):
                paths.append(Path((out / f"named{rank}").read_text(encoding="utf-8")))
                segment = (out / f"segment{rank}").read_text(encoding="ascii")
                paths.append(process.SHARED_MEMORY / segment)
                paths.append(Path("/proc") / (out / f"pid{rank}").read_text(encoding="ascii"))
        return [path for path in paths if path.exists()]

    deadline = time.monotonic() + 20
    while left() and time.monotonic() < deadline:  # the guard of a stopped job has its own pace
        time.sleep(0.2)
    assert left() == []


@pytest.fixture
def on_cluster(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slurm's commands speak to the cluster."""
    for name, value in cluster.environment.items():
        monkeypatch.setenv(name, value)


@pytest.mark.usefixtures("on_cluster")
def test_the_tiny_recipe_trains_on_two_nodes(chat_folder: Path) -> None:
    command = real_jobs.launch_command(
        "sanity.tiny_dense", "--out", "on_slurm", *TWO_NODES, *chat_run.WORDS
    )
    with real_jobs.started(command, chat_folder, (chat_run.E2E,)) as job:
        stdout, stderr = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, stdout + stderr
    chat_run.assert_trained(chat_folder / "on_slurm")
    assert "run folder: on_slurm" in stdout


@pytest.mark.usefixtures("on_cluster")
def test_a_run_that_slurm_stops_is_queued_again_and_goes_on_where_it_was(
    cluster: Any, chat_folder: Path
) -> None:
    others = [word for word in chat_run.WORDS if not word.startswith("train.iterations=")]
    words = ["--restarts", "2", *others, "train.iterations=4", "checkpoint.every=1"]
    command = real_jobs.launch_command("sanity.tiny_dense", "--out", "stopped", *TWO_NODES, *words)
    out = chat_folder / "stopped"
    with real_jobs.started(command, chat_folder, (chat_run.E2E,)) as job:
        real_jobs.wait_until(lambda: real_jobs.events(out, "checkpoint"), job)
        (log,) = out.glob("launcher/experiments/*/*/*/sbatch_*.out")
        number = log.stem.rpartition("_")[2]
        cluster.run("scancel", "--signal=TERM", number)
        stdout, stderr = job.communicate(timeout=PATIENCE_S)
    assert job.returncode == 0, stdout + stderr
    assert "Restarts=1 " in cluster.run("scontrol", "-o", "show", "job", number)
    assert [event["iteration"] for event in real_jobs.events(out, "iteration")] == [0, 1, 2, 3]
    (resumed,) = real_jobs.events(out, "resume")
    assert resumed["iteration"] >= 1
    assert [event["status"] for event in real_jobs.events(out, "end")][-1] == "completed"


@pytest.mark.usefixtures("on_cluster")
def test_a_job_that_waits_for_a_node_that_is_gone_is_not_submitted(
    cluster: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["sanity.tiny_dense", *TWO_NODES, "--out", str(tmp_path / "out")]
    words += ["parallel.rollout_tp_size=1"]
    before = cluster.run("squeue", "-h", "-o", "%i")
    cluster.run("scontrol", "update", "nodename=n2", "state=fail", "reason=test")
    try:
        assert launcher.main(words) == 2
    finally:
        cluster.run("scontrol", "update", "nodename=n2", "state=resume")
    said = capsys.readouterr().err
    for part in ("too few nodes can be reached", "n2 is fail", "at most 1", "show node n2"):
        assert part in said
    assert cluster.run("squeue", "-h", "-o", "%i") == before
    assert not (tmp_path / "out").exists()
