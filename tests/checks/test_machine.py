"""The doctor tells what would go wrong; its judgements are tried on made-up machines."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_precision.checks import machine


def test_the_web_toolkit_called_apex_is_not_taken_for_nvidias(tmp_path: Path) -> None:
    web = tmp_path / "web"
    (web / "apex").mkdir(parents=True)
    found = machine.apex("0.9.10.dev0", web / "apex")
    assert found.state == "missing"
    assert "unrelated" in found.text
    assert "pip uninstall apex" in found.remedy
    (web / "apex" / "normalization").mkdir()
    assert machine.apex("0.1", web / "apex").state == "ok"
    assert machine.apex(None, None).state == "optional"


@pytest.mark.parametrize(
    ("flags", "bf16", "fp16"),
    [
        ("fpu avx2", "not native", "not native"),
        ("fpu avx512f avx512_bf16", "native (avx512_bf16)", "not native"),
        (
            "avx512_bf16 avx512_fp16 amx_bf16",
            "native (amx_bf16, avx512_bf16)",
            "native (avx512_fp16)",
        ),
    ],
)
def test_native_dtypes_are_read_from_the_processors_flags(flags: str, bf16: str, fp16: str) -> None:
    text = f"processor\t: 0\nmodel name\t: A CPU: fast\nflags\t\t: {flags}\n\n"
    found = {finding.name: finding.text for finding in machine.cpu_dtypes(text)}
    assert found["cpu"] == "A CPU: fast"
    assert found["bf16"].startswith(bf16)
    assert found["fp16"].startswith(fp16)


def test_something_needed_and_missing_makes_the_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("packages", "device"):
        monkeypatch.setattr(machine, name, lambda: iter(()))
    monkeypatch.setattr(
        machine, "machine", lambda: iter([machine.Finding("x", "optional", "not installed")])
    )
    assert machine.run() == 0
    monkeypatch.setattr(
        machine, "machine", lambda: iter([machine.Finding("x", "missing", "gone", "get one")])
    )
    assert machine.run() == 1
    assert "get one" in capsys.readouterr().out
