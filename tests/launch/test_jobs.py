"""What every launcher's job has in common."""

from __future__ import annotations

import os

import pytest

from megatron_precision.launch.jobs import CHECKOUT, python_path


@pytest.mark.parametrize(
    ("theirs", "more"),
    [
        (None, []),
        ("", []),
        (str(CHECKOUT), []),
        (f"{CHECKOUT}{os.pathsep}/mine", ["/mine"]),
        (f"/mine{os.pathsep}{os.pathsep}/also", ["/mine", "/also"]),
    ],
)
def test_the_checkout_comes_first_and_once(
    theirs: str | None, more: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTHONPATH", raising=False)
    if theirs is not None:
        monkeypatch.setenv("PYTHONPATH", theirs)
    assert python_path().split(os.pathsep) == [str(CHECKOUT), *more]
