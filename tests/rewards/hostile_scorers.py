"""Scorers that misbehave, for workers to load by name; a response says what to do."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path


def process_id(response: str, answer: str) -> float:
    """Sleep as many seconds as the response says, and give the worker's process id."""
    time.sleep(float(response))
    return float(os.getpid())


def length(response: str, answer: str) -> float:
    """Characters of the response."""
    return float(len(response))


def obey(response: str, answer: str) -> float:
    """Do what the response says; the answer is a file for the process id, or empty."""
    if answer:
        partial = Path(answer + ".partial")
        partial.write_text(str(os.getpid()), encoding="ascii")
        partial.replace(answer)
    return _DEEDS[response]()


def _endless_loop() -> float:
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGALRM):
        signal.signal(number, signal.SIG_IGN)
    while True:
        pass


def _endless_power() -> float:
    # One product in C: no signal handler of Python would run until it is done.
    return float(9**9**9)


def _raise() -> float:
    raise LookupError("this scorer has a bug")


def _recurse() -> float:
    return _recurse()


def _end_of_file() -> float:
    # A pipe that ends raises the same.
    raise EOFError("no more input")


def _much_memory() -> float:
    return float(len(bytearray(16 * 2**30)))


def _be_killed() -> float:
    os.kill(os.getpid(), signal.SIGKILL)
    return 1.0


def _exit() -> float:
    sys.exit(7)


def _say_text() -> float:
    return "1.0"  # type: ignore[return-value]


_DEEDS = {
    "one": lambda: 1.0,
    "loop": _endless_loop,
    "power": _endless_power,
    "raise": _raise,
    "recurse": _recurse,
    "end of file": _end_of_file,
    "memory": _much_memory,
    "kill": _be_killed,
    "exit": _exit,
    "nan": lambda: float("nan"),
    "text": _say_text,
    "true": lambda: True,
}
