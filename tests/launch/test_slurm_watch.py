"""What a job array's records say, in the words of a Slurm 22.05 (`scontrol -o show job`)."""

from __future__ import annotations

import pytest

from megatron_precision.launch import slurm_watch

# From tests/cluster's cluster, shortened: the fields that are read, and one with a similar name.
WAITS = "JobId=7 ArrayTaskId=2-3%1 JobState=PENDING Reason=JobArrayTaskLimit Restarts=0 \
ExitCode=0:0 EndTime=Unknown ReqNodeList=(null) NodeList= NumNodes=1-1"
RUNS = "JobId=9 ArrayTaskId=2 JobState=RUNNING Reason=None Restarts=0 ExitCode=0:0 \
EndTime=2026-11-26T02:55:22 ReqNodeList=(null) NodeList=n1"
STOPPED = "JobId=8 ArrayTaskId=1 JobState=FAILED Reason=NonZeroExitCode Restarts=0 ExitCode=1:0 \
EndTime=2026-11-26T02:40:23 ReqNodeList=(null) NodeList=n1"
DONE = "JobId=9 ArrayTaskId=2 JobState=COMPLETED Reason=None Restarts=0 ExitCode=0:0 \
EndTime=2026-11-26T02:55:22 ReqNodeList=(null) NodeList=n1"
NOT_NEEDED = "JobId=7 ArrayTaskId=4294967294 JobState=CANCELLED Reason=None Restarts=0 \
ExitCode=0:0 EndTime=2026-11-26T02:55:23 ReqNodeList=(null) NodeList= NumNodes=1-1"


@pytest.mark.parametrize(
    ("records", "name", "restarts", "ended"),
    [
        ([WAITS], "PENDING", 1, False),
        ([WAITS, RUNS, STOPPED], "RUNNING", 1, False),
        ([WAITS, STOPPED], "PENDING", 1, False),
        ([NOT_NEEDED, DONE, STOPPED], "COMPLETED", 1, True),
        ([NOT_NEEDED, STOPPED], "FAILED", 0, True),
        ([NOT_NEEDED], "CANCELLED", 0, True),
    ],
)
def test_an_array_is_as_its_task_that_runs_or_waits_or_was_the_last_to_run(
    records: list[str], name: str, restarts: int, ended: bool
) -> None:
    for order in (records, records[::-1]):
        found = slurm_watch.of_record(slurm_watch.telling(order))
        assert (found.name, found.restarts, found.ended) == (name, restarts, ended)
