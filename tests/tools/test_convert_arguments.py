"""What the converter refuses by its arguments alone: all of it at once, before torch is loaded."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.oracle import DENSE
from tests.tools.hf_folders import save
from tools.checkpoint_convert import convert
from tools.checkpoint_convert.cli import main

ROOT = Path(__file__).resolve().parents[2]


def python(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, *words], env=environment, capture_output=True, text=True, timeout=120
    )


def test_all_that_is_wrong_is_listed_and_torch_is_not_loaded(tmp_path: Path) -> None:
    words = ["import", "", str(tmp_path), "--tp", "0", "--pp", "-1", "--workers", "0"]
    code = f"""
import sys
from tools.checkpoint_convert.cli import main
code = main({words!r})
assert "torch" not in sys.modules
sys.exit(code)
"""
    done = python("-c", code)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: 5 problems")
    assert "an empty path\n    where:    FROM" in done.stderr
    assert "got:      a folder that exists" in done.stderr
    for option, got in (("--tp", "0"), ("--pp", "-1"), ("--workers", "0")):
        told = f"a number below 1\n    where:    {option}\n    got:      {got}\n"
        assert told + "    expected: 1 or more" in done.stderr


def test_a_million_workers_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save(DENSE, tmp_path / "hf")
    words = ["import", str(tmp_path / "hf"), str(tmp_path / "out"), "--workers", "1000000"]
    assert main(words) == 2
    assert "too many processes\n    where:    --workers\n" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_misspelt_command_gets_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["imprt", "a", "b"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: unknown command 'imprt'\n")
    assert "remedy:   did you mean import" in error


def test_the_usage_names_what_was_called(tmp_path: Path) -> None:
    script = tmp_path / "megatron-precision-convert"
    script.write_text("from tools.checkpoint_convert.cli import main\nmain()\n", encoding="utf-8")
    assert python(str(script), "--help").stdout.startswith("usage: megatron-precision-convert ")
    module = "tools.checkpoint_convert"
    assert python("-m", module, "--help").stdout.startswith(f"usage: python -m {module} ")


def test_the_other_direction_is_refused_with_the_command_for_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, megatron, out = save(DENSE, tmp_path / "hf"), tmp_path / "megatron", tmp_path / "out"
    convert.import_checkpoint(hf, megatron)
    for wrong, right, source in (("import", "export", megatron), ("export", "import", hf)):
        assert main([wrong, str(source), str(out)]) == 2
        remedy = capsys.readouterr().err.split("remedy:")[1].strip()
        assert remedy == f"python -m tools.checkpoint_convert {right} {source} {out}"
        assert not out.exists()
        assert main(remedy.split()[3:]) == 0
        assert out.exists()
        out.rename(tmp_path / right)
        capsys.readouterr()


def test_output_and_input_are_not_inside_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = save(DENSE, tmp_path / "models" / "hf")
    before = sorted(tmp_path.rglob("*"))
    (tmp_path / "link").symlink_to(hf)
    for target in (hf / "out", hf / "a" / "b", tmp_path / "link" / "out"):
        assert main(["import", str(hf), str(target)]) == 2
        assert "the output is inside the input" in capsys.readouterr().err
    assert main(["import", str(hf), str(hf.parent)]) == 2
    assert "not a new folder" in capsys.readouterr().err
    (tmp_path / "link").unlink()
    assert sorted(tmp_path.rglob("*")) == before


def test_a_file_where_a_folder_is_wanted_is_called_a_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = save(DENSE, tmp_path / "hf")
    file = hf / "config.json"
    for words in (
        ["inspect", str(file)],
        ["inspect", str(hf), "--config", str(file)],
        ["verify", str(hf), str(file)],
    ):
        assert main(words) == 2
        shown = capsys.readouterr().err
        assert "a file, where a folder is wanted" in shown
        assert f"give the folder that holds it: {hf}" in shown
    assert main(["import", str(hf), str(hf.parent / "hf.txt" / "out")]) == 0
    (tmp_path / "note").write_text("x", encoding="utf-8")
    assert main(["import", str(hf), str(tmp_path / "note" / "out")]) == 2
    assert "the output is below a file" in capsys.readouterr().err
    assert main(["inspect", str(tmp_path / "nowhere")]) == 2
    assert "no such folder" in capsys.readouterr().err


def test_logits_of_one_format_are_refused_before_anything_is_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = save(DENSE, tmp_path / "hf")
    assert main(["verify", str(hf), str(hf), "--logits"]) == 2
    shown = capsys.readouterr()
    assert "one format twice" in shown.err
    assert shown.out == ""


def test_a_reader_that_goes_away_is_no_mistake(tmp_path: Path) -> None:
    hf = save(DENSE, tmp_path / "hf")
    read, write = os.pipe()
    os.close(read)
    words = [sys.executable, "-m", "tools.checkpoint_convert", "inspect", str(hf)]
    with open(write, "w", encoding="ascii") as closed:
        done = subprocess.run(
            words, cwd=ROOT, stdout=closed, stderr=subprocess.PIPE, text=True, timeout=120
        )
    assert (done.returncode, done.stderr) == (141, "")
