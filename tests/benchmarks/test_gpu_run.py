"""What has a result is not done again, what was cut short goes on, and nothing is called done that
is not. The commands are small ones; the slow test runs a real measure."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.gpu import experiments, run
from benchmarks.gpu.experiments import TESTS, WORK, Command, Experiment, agenda, read_results
from megatron_precision.launch.local import exclusive

ROOT = Path(__file__).resolve().parents[2]


APPEND = "import sys; open(sys.argv[1], 'a').write(sys.argv[2])"
FINISH = "import json, sys; json.dump({'answer': 42}, open(sys.argv[1], 'w'))"


def experiment(second: str, product: str = "") -> Experiment:
    return Experiment(
        name="small",
        commands=(
            Command(("-c", APPEND, f"{WORK}/first", "x")),
            Command(("-c", second, f"{WORK}/result.json"), product),
        ),
        results=("result.json",),
        kept=(("first", ".txt"),),
    )


def pytest_on(file: Path) -> Experiment:
    words = ("-m", "pytest", "-c", "/dev/null", "-p", "no:cacheprovider")
    words += (f"--junitxml={WORK}/tests.xml", str(file))
    return Experiment("small", (Command(words, ok=(0, 1)),), ("tests.xml",))


def run_one(item: Experiment, out: Path, budget_s: float = 60) -> tuple[int, dict[str, object]]:
    out.mkdir(exist_ok=True)
    failed = run.run_all([item], out, tiny=True, budget_s=budget_s)
    path = out / "small.json"
    return failed, json.loads(path.read_text()) if path.is_file() else {}


def test_a_result_has_its_commands_and_what_is_kept(tmp_path: Path) -> None:
    failed, found = run_one(experiment(FINISH), tmp_path)
    assert failed == 0
    assert found["answer"] == 42
    assert len(found["seconds"]) == len(found["commands"]) == 2  # type: ignore[arg-type]
    assert str(tmp_path) not in json.dumps(found)
    assert (tmp_path / "small.txt").read_text() == "x"


def test_it_goes_on_behind_the_last_command_that_ended(tmp_path: Path) -> None:
    failed, found = run_one(experiment("import sys; print('no luck'); sys.exit(3)"), tmp_path)
    assert failed == 1
    assert "exit code 3, no luck" in str(found["error"])
    assert "no luck" in (tmp_path / "small.log").read_text()
    failed, found = run_one(experiment(FINISH), tmp_path)
    assert (failed, found.get("error")) == (0, None)
    assert (tmp_path / "small.txt").read_text() == "x"  # once


def test_what_has_a_result_is_not_done_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_one(experiment(FINISH), tmp_path)
    assert run_one(experiment("raise SystemExit(1)"), tmp_path)[0] == 0
    assert "there already" in capsys.readouterr().out


def test_a_budget_ends_what_is_under_way(tmp_path: Path) -> None:
    begin = time.monotonic()
    failed, found = run_one(experiment("import time; time.sleep(60)"), tmp_path, budget_s=3)
    assert time.monotonic() - begin < 30
    assert failed == 1
    assert "exit code -15" in str(found["error"])


def test_no_budget_begins_nothing(tmp_path: Path) -> None:
    assert run_one(experiment(FINISH), tmp_path, budget_s=0) == (0, {})


def test_tests_that_fail_are_a_result_and_no_success(tmp_path: Path) -> None:
    (tmp_path / "test_three.py").write_text(
        "import pytest\ndef test_a(): pass\ndef test_b(): assert 1 == 2\n"
        "def test_c(): pytest.skip('no GPU')\n"
        "@pytest.fixture\ndef broken(): raise OSError('gone')\ndef test_d(broken): pass\n"
    )
    item = pytest_on(tmp_path / "test_three.py")
    for _ in range(2):  # the second time its result is there
        failed, found = run_one(item, tmp_path / "out")
        assert failed == 1
    assert [found[key] for key in ("passed", "failed", "skipped")] == [1, 2, 1]
    outcomes = {test["test"]: test["outcome"] for test in found["tests"]}  # type: ignore[attr-defined]
    assert outcomes == {
        "test_a": "passed", "test_b": "failed", "test_c": "skipped", "test_d": "failed"
    }  # fmt: skip


def test_tests_that_are_all_skipped_are_no_result(tmp_path: Path) -> None:
    (tmp_path / "test_one.py").write_text("import pytest\ndef test_a(): pytest.skip('no GPU')\n")
    item = pytest_on(tmp_path / "test_one.py")
    failed, found = run_one(item, tmp_path / "out")
    assert failed == 1
    assert "all 1 tests were skipped" in str(found["error"])


def test_cuda_without_a_driver_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(run, "DRIVER", tmp_path / "nowhere")
    monkeypatch.setenv("MEGATRON_PRECISION_PLATFORM", "cuda")
    monkeypatch.setattr(sys, "argv", ["bench_gpu.py", "--out", str(tmp_path / "out")])
    assert run.main() == 2
    assert "no GPU here to measure" in capsys.readouterr().err
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--tables"])
    assert run.main() == 2
    assert "no results" in capsys.readouterr().err


def test_tests_that_cannot_be_collected_are_no_result(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("import nothing_of_that_name\n")
    item = pytest_on(tmp_path / "test_broken.py")
    failed, found = run_one(item, tmp_path / "out")
    assert failed == 1
    assert "exit code 2" in str(found["error"])


def test_a_result_that_is_not_whole_is_none_and_made_again(tmp_path: Path) -> None:
    failed, found = run_one(experiment("import sys; open(sys.argv[1], 'w').write('{')"), tmp_path)
    assert failed == 1
    assert "no result" in str(found["error"])
    failed, found = run_one(experiment(FINISH), tmp_path)
    assert (failed, found.get("error")) == (0, None)


def test_a_file_that_is_not_whole_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "half.json").write_text('{"a": ')
    with pytest.raises(ValueError, match="Expecting"):
        read_results([tmp_path / "half.json"])


def test_a_product_says_that_its_command_has_ended(tmp_path: Path) -> None:
    ends_badly = FINISH + "; sys.stdout.flush(); import os; os._exit(9)"
    assert run_one(experiment(ends_badly, "result.json"), tmp_path)[0] == 1
    failed, found = run_one(experiment("raise SystemExit('asked twice')", "result.json"), tmp_path)
    assert (failed, found["answer"]) == (0, 42)


def test_what_failed_comes_behind_what_was_never_begun(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_one(experiment("raise SystemExit(1)"), tmp_path)
    (tmp_path / "large.json").write_text('{"left_out": "too large"}')
    names = ("large", "small", "fresh")
    items = [dataclasses.replace(experiment(FINISH), name=name) for name in names]
    capsys.readouterr()
    assert run.run_all(items, tmp_path, tiny=True, budget_s=60) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "fresh", "small", "large"
    ]  # fmt: skip


def test_every_test_of_one_gpu_is_on_the_agenda() -> None:
    files = sorted(path.name for path in (ROOT / "tests" / "gpu").glob("test_*.py"))
    assert sorted(Path(command.words[-1]).name for command in TESTS.commands) == files


def test_names_are_unique_and_the_first_hours_worth_comes_first() -> None:
    for tiny in (True, False):
        names = [item.name for item in agenda(tiny)]
        assert len(set(names)) == len(names)
        assert names[:4] == [
            "train-qwen3-1.7b-16k-packed-fused-fp16", "train-qwen3-1.7b-16k-packed-fused-bf16",
            "engine-qwen3-1.7b-fp16", "engine-qwen3-1.7b-bf16",
        ]  # fmt: skip
        assert names[4] == "tests"
        assert names[-2:] == ["mismatch-smollm2", "sanity-smollm2"]


def test_mistakes_are_answered_at_once(tmp_path: Path) -> None:
    words = [sys.executable, "benchmarks/gpu/run.py", "--out", str(tmp_path / "out")]
    words += ["--platform", "cpu", "--only", "train-qwen3-5b"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "did you mean train-qwen3" in done.stderr
    assert "--tiny" in done.stderr
    assert not (tmp_path / "out").exists()


def test_two_do_not_measure_into_one_folder(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    words = [sys.executable, "benchmarks/gpu/run.py", "--out", str(tmp_path), "--tiny"]
    with exclusive(tmp_path / "work" / "lock"):
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert "remedy" in done.stderr


@pytest.mark.slow
def test_a_real_measure_is_profiled_and_tabled(tmp_path: Path) -> None:
    words = [sys.executable, "benchmarks/gpu/run.py", "--out", str(tmp_path)]
    options = ["--platform", "cpu", "--tiny", "--only", "train-qwen3-1.7b-4k-fp16"]
    done = subprocess.run([*words, *options], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "train-qwen3-1.7b-4k-fp16.json").read_text())
    profile = found["profile"]
    assert 0 < profile["busy_s"] < 1.5 * profile["seconds"]  # one thread's operators
    assert profile["by_class"]["products"] > 0
    printed = subprocess.run([*words, "--tables"], cwd=ROOT, capture_output=True, text=True)
    assert f"{found['tokens_per_s']:,.0f} / -" in printed.stdout


def test_measures_come_as_they_are_named() -> None:
    def listed(*words: str) -> list[str]:
        command = [
            sys.executable,
            "benchmarks/gpu/run.py",
            "--out",
            "x",
            "--list",
            "--only",
            *words,
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
        return [line.split()[0] for line in done.stdout.splitlines()]

    packed = "train-qwen3-1.7b-16k-packed-fused"
    named = listed(packed, "engine-qwen3-1.7b-fp16", f"{packed}-bf16")
    assert named == [f"{packed}-fp16", f"{packed}-bf16", "engine-qwen3-1.7b-fp16"]


# A measure that says when it came, waits to be let go, and says when it measured.
STUB = """
import json, pathlib, sys, time
out, name = pathlib.Path(sys.argv[1]), sys.argv[2]
begun = time.monotonic()
if name == sys.argv[3]:
    sys.exit("it cannot even import")
if sys.stdin.buffer.readline() != b"go\\n":
    sys.exit("nobody waits")
let_go = time.monotonic()
time.sleep(float(sys.argv[4]))
facts = {"begun": begun, "let_go": let_go, "ended": time.monotonic()}
(out / f"{name}.json").write_text(json.dumps(facts))
"""


def measure_stubs(
    monkeypatch: pytest.MonkeyPatch,
    out: Path,
    *,
    ahead: bool,
    broken: str = "",
    takes_s: float = 1,
    budget_s: float = 60,
) -> tuple[int, dict[str, dict[str, float]]]:
    def command(self: object, item: run.Case) -> list[str]:
        return [sys.executable, "-c", STUB, str(out), item.name, broken, str(takes_s)]

    monkeypatch.setattr(run.Measuring, "command", command)
    out.mkdir()
    cases = [case for case in agenda(True) if isinstance(case, run.Case)][:3]
    failed = run.run_all(cases, out, True, budget_s, ahead)
    return failed, {path.stem: json.loads(path.read_text()) for path in out.glob("*.json")}


@pytest.mark.parametrize("ahead", [True, False])
def test_one_measures_at_a_time_and_the_next_may_have_begun(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, ahead: bool
) -> None:
    failed, found = measure_stubs(monkeypatch, tmp_path / "out", ahead=ahead)
    assert failed == 0
    first, second, third = sorted(found.values(), key=lambda facts: facts["let_go"])
    for one, later in ((first, second), (second, third)):
        assert later["let_go"] > one["ended"]
        assert (later["begun"] < one["ended"]) == ahead


def test_one_that_dies_while_it_waits_has_failed_and_the_others_have_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = "train-qwen3-1.7b-16k-packed-fused-bf16"
    failed, found = measure_stubs(monkeypatch, tmp_path / "out", ahead=True, broken=broken)
    assert failed == 1
    assert "it cannot even import" in str(found.pop(broken)["error"])
    assert len([facts for facts in found.values() if "ended" in facts]) == 2


def test_one_that_waits_ends_with_the_budget(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    monkeypatch.setattr(experiments, "GRACE_S", 1.0)
    failed, found = measure_stubs(monkeypatch, out, ahead=True, takes_s=60, budget_s=3)
    assert failed == 1
    assert len(found) == 1
    assert "exit code" in str(found.popitem()[1]["error"])
    left = subprocess.run(["pgrep", "-f", str(out)], capture_output=True, text=True)
    assert left.stdout == ""
