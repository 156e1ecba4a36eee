"""`plan` and the sizes of `launch.py`, as a user types them: no GPU, no weights, no torch."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from megatron_precision.cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_a_plan_prints_every_stage_and_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["plan", "moe.grpo_seq_mis", "--gpus", "16"]) == 0
    text = capsys.readouterr().out
    assert "stage 0" in text
    assert "stage 1" in text
    assert "of 80 GB on the fullest rank" in text


def test_a_layout_that_does_not_fit_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["parallel.tp_size=4", "train.micro_batch_size=4"]
    assert main.main(["plan", "dense14b.dapo", "--set", *words]) == 2
    shown = capsys.readouterr()
    assert "logits" in shown.out
    assert "does not fit 8 GPUs of 80 GB" in shown.err


def test_the_table_of_sizes_has_a_row_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["plan", "moe.pg_seq_tis", "--all-sizes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["size"] for row in rows] == [
        "8 GPUs of 80 GB",
        "16 GPUs of 80 GB",
        "32 GPUs of 80 GB",
        "8 GPUs of 141 GB",
    ]
    assert "does not fit" in rows[0]["refused"]
    for row in rows[1:]:
        assert row["fits"]
        assert sum(v for k, v in row["bytes"].items() if k != "total") == row["bytes"]["total"]


def test_json_has_what_the_tables_have(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--nodes", "4", "--mean-prompt", "200", "--mean-response", "5000"]
    assert main.main(["plan", "moe.grpo_seq_mis", "--json", *words]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["nodes"], found["parallel"]["world_size"]) == (4, 32)
    assert found["vocabulary_rows"] == {"model": 151936, "trainer": 151936, "engines": 151936}
    assert len(found["stages"]) == 4
    assert max(stage["total"] for stage in found["stages"]) == found["bytes"]["total"]
    # What is allocated in a phase is all but what another phase alone needs.
    sizes = found["bytes"]
    passes = sizes["activations"] + sizes["logits"]
    assert found["phases"] == {
        "training": sizes["total"] - sizes["engine_workspace"],
        "sync": sizes["total"] - sizes["engine_workspace"] - passes,
        "rollout": sizes["total"] - passes,
    }
    assert set(found["cases"]) == {"mean", "limit"}
    mean, limit = found["cases"]["mean"], found["cases"]["limit"]
    assert mean["lengths"] == {"prompt": 200.0, "response": 5000.0}
    assert mean["work"]["trained_tokens"] == 8192 * 5200
    assert mean["estimate"]["gpu_hours"] < limit["estimate"]["gpu_hours"]


def test_rates_of_the_card_and_of_the_options(capsys: pytest.CaptureFixture[str]) -> None:
    def rates(*words: str) -> dict[str, float]:
        assert main.main(["plan", "dense14b.dapo", "--json", *words]) == 0
        found: dict[str, float] = json.loads(capsys.readouterr().out)["rates"]
        return found

    assert rates()["hbm"] == 3.35e12
    assert rates("--gpu-gb", "141")["hbm"] == 4.8e12
    given = rates("--tflops", "400", "--mfu", "0.5", "--hbm", "2", "--nic", "25")
    assert given["flops"] == 4e14
    assert (given["mfu"], given["hbm"], given["nic"]) == (0.5, 2e12, 25e9)


def test_a_thousand_gpus_are_the_largest_layout_widened(
    capsys: pytest.CaptureFixture[str],
) -> None:
    begin = time.process_time()
    assert main.main(["plan", "moe.grpo_seq_mis", "--world", "1024", "--json"]) == 0
    assert time.process_time() - begin < 3
    found = json.loads(capsys.readouterr().out)
    assert found["nodes"] == 128
    sizes = [found["parallel"][f"{name}_size"] for name in ("tp", "pp", "ep", "rollout_tp")]
    assert sizes == [4, 4, 8, 8]


def test_a_job_smaller_than_every_layout_is_told_what_it_lacks(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main.main(["plan", "moe.grpo_seq_mis", "--nodes", "1"]) == 2
    text = capsys.readouterr().err
    assert "does not fit 8 GPUs of 80 GB" in text
    assert "8 GPUs of 141 GB with" in text


def test_no_line_is_wider_than_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["dense14b.dapo"], ["moe.grpo_seq_mis", "--world", "1024"]):
        assert main.main(["plan", *words]) == 0
        assert max(map(len, capsys.readouterr().out.splitlines())) <= 100


def test_every_mistake_is_listed_at_once_with_what_would_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["--nodes", "3", "--world", "8", "--mfu", "2", "--set", "parallel.pp_size=3", "a.b=1"]
    assert main.main(["plan", "dense14b.dapo", *words]) == 2
    text = capsys.readouterr().err
    for part in ("the job has several sizes", "--mfu", "unknown override path", "40 / 3"):
        assert part in text
    changed = ["--set", "parallel.tp_size=16", "parallel.rollout_tp_size=3"]
    assert main.main(["plan", "dense14b.dapo", *changed]) == 2
    text = capsys.readouterr().err
    for part in ("40 / 16", "8 / 16", "40 / 3", "151936 / 3", "8 / 3"):
        assert part in text
    remedy = text.rpartition("remedy:")[2].partition("--set ")[2].partition(" (")[0].split()
    assert {word.partition("=")[0] for word in remedy} >= {w.partition("=")[0] for w in changed[1:]}
    assert main.main(["plan", "dense14b.dapo", "--set", *remedy]) == 0


def test_a_size_that_nothing_divides_is_refused_with_its_neighbours(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main.main(["plan", "dense14b.dapo", "--world", "12"]) == 2
    text = capsys.readouterr().err
    for part in ("the nodes are not full", "12 / 8", "no layout of 12 GPUs", "16 GPUs with"):
        assert part in text


def test_a_run_that_does_not_fit_is_refused_before_it_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["train", "dense14b.dapo", "--dryrun", "--set", "rollout.kv_cache_mib=65536"]
    assert main.main(words) == 2
    assert "rollout.kv_cache_mib=" in capsys.readouterr().err.partition("remedy")[2]


def test_context_parallelism_and_unequal_stages_are_refused_with_what_to_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["model.num_hidden_layers=94", "parallel.pp_size=4", "parallel.cp_size=2"]
    assert main.main(["plan", "moe.grpo_seq_mis", "--set", *words]) == 2
    text = capsys.readouterr().err
    assert "a divisor of 94: 1, 2, 47, 94" in text
    assert "context parallelism is not supported" in text
    assert "memory.recompute=full" in text


def test_a_dry_run_on_sixteen_gpus_needs_no_torch() -> None:
    code = (
        "import sys, runpy\n"
        "sys.argv = ['launch.py', 'dense14b.dapo', '--gpus', '16', '--dryrun']\n"
        "try:\n    runpy.run_path('launch.py', run_name='__main__')\n"
        "except SystemExit as end:\n    assert end.code == 0, end.code\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert '"world_size": 16' in done.stdout
    assert "train dense14b.dapo --gpus 16" in done.stdout


README = {
    "sanity.r1d_1_5b": "recipes/sanity/README.md",
    "dense14b.dapo": "recipes/dense14b/README.md",
    "moe.grpo_seq_mis": "recipes/moe/README.md",
    "octothinker.octothinker_3b": "recipes/octothinker/README.md",
}


@pytest.mark.parametrize("name", list(README))
def test_the_table_of_a_readme_is_what_the_command_prints(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    main.main(["plan", name, "--all-sizes"])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) == 2 + 4
    # Size, layout, total and verdict; the parts are the command's alone.
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in printed]
    rows = [[*row[:2], *row[-2:]] for row in cells]
    text = (ROOT / README[name]).read_text(encoding="utf-8")
    shown = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    first = shown.index(rows[0])
    assert shown[first : first + len(rows)] == rows
