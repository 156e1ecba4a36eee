"""The batch shell's own part: what is started again after which end, with stand-ins for Slurm.

The same on a real Slurm, for the ends that take seconds there: tests/cluster/test_slurm.py.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SETUP = Path(__file__).resolve().parents[2] / "megatron_precision" / "launch" / "slurm_setup.sh"
CRASH = "rank 1 time_s 1.0 kind crash\\nthe reason\\n"
USER = "rank 0 time_s 1.0 kind user\\nthe mistake\\n"


def ended(
    folder: Path,
    code: int,
    recorded: str = "",
    retries: int = 0,
    restarts: int = 0,
    kept: int = 0,
    **variables: str,
) -> tuple[int, str, str]:
    """Exit code of a step that ended so, what nemo-run's script is left, and what is cancelled."""
    stubs, errors = folder / "stubs", folder / "errors"
    stubs.mkdir()
    (stubs / "srun").write_text(
        f"#!/bin/sh\n[ -z '{recorded}' ] || {{ mkdir -p {errors}; "
        f"printf '{recorded}' > {errors}/rank1.txt; }}\nexit {code}\n"
    )
    (stubs / "scancel").write_text(f'#!/bin/sh\necho "$@" > {folder}/cancelled\n')
    for stub in stubs.iterdir():
        stub.chmod(0o755)
    for number in range(kept):
        (folder / f"errors.before-7-{number + 1}").mkdir()
    script = (
        f"head_node_ip=10.0.0.1\nTORCHX_MAX_RETRIES={retries + restarts}\nerrors={errors}\n"
        f"retries={retries}\nrestarts={restarts}\n{SETUP.read_text()}\n"
        'srun torchrun\necho "$? $TORCHX_MAX_RETRIES"\ntrap - EXIT\n'
    )
    environment = {"PATH": f"{stubs}:/usr/bin:/bin", "SLURM_JOB_ID": "7", **variables}
    done = subprocess.run(
        ["bash", "-c", script], env=environment, capture_output=True, text=True, check=True
    )
    exit_code, left = done.stdout.split()
    cancelled = folder / "cancelled"
    return int(exit_code), left, cancelled.read_text() if cancelled.exists() else ""


@pytest.mark.parametrize(
    ("restart_count", "kept", "left"),
    [("0", 0, "3"), ("1", 0, "3"), ("2", 0, "0"), ("2", 1, "3")],
)
def test_a_stop_counts_against_restarts_alone(
    tmp_path: Path, restart_count: str, kept: int, left: str
) -> None:
    """Two restarts and a retry: the third stop is the last, whatever failed in between."""
    found = ended(tmp_path, 1, retries=1, restarts=2, kept=kept, SLURM_RESTART_COUNT=restart_count)
    assert found == (1, left, "")


def test_a_stop_is_no_failure_to_retry(tmp_path: Path) -> None:
    assert ended(tmp_path, 1, retries=3) == (1, "0", "")


@pytest.mark.parametrize(("kept", "left"), [(0, "3"), (1, "0")])
def test_a_failure_counts_against_retries_alone(tmp_path: Path, kept: int, left: str) -> None:
    found = ended(
        tmp_path, 1, CRASH, retries=1, restarts=2, kept=kept, SLURM_RESTART_COUNT=str(kept)
    )
    assert found == (1, left, "")


def test_a_mistake_of_the_users_is_not_started_again(tmp_path: Path) -> None:
    assert ended(tmp_path, 1, USER, retries=3, restarts=3) == (2, "0", "")


def test_a_command_that_is_not_there_is_a_failure_with_a_reason(tmp_path: Path) -> None:
    assert ended(tmp_path, 127, restarts=20) == (127, "0", "")
    text = (tmp_path / "errors" / "rank0.txt").read_text()
    head, reason = text.splitlines()
    assert len(head.split()) == 6  # as a rank's own record
    assert reason == "the command of the job was not found (exit code 127)"


@pytest.mark.parametrize(
    ("code", "recorded", "cancelled"),
    [(1, "", ""), (0, "", "--state=PENDING 5\n"), (1, CRASH, "--state=PENDING 5\n")],
)
def test_an_array_goes_on_after_a_stop_and_after_nothing_else(
    tmp_path: Path, code: int, recorded: str, cancelled: str
) -> None:
    found = ended(tmp_path, code, recorded, SLURM_ARRAY_JOB_ID="5", SLURM_ARRAY_TASK_ID="2")
    assert found == (code, "0", cancelled)
