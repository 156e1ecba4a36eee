"""`plan` and the sizes of `launch.py`, as a user types them: no GPU, no weights, no torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_precision import cli

ROOT = Path(__file__).resolve().parents[2]


def test_a_plan_prints_every_stage_and_the_verdict(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "moe.grpo_seq_mis", "--gpus", "16"]) == 0
    text = capsys.readouterr().out
    assert "stage 0" in text
    assert "stage 1" in text
    assert "of 80 GB on the fullest rank" in text


def test_a_layout_that_does_not_fit_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["parallel.tp_size=4", "train.micro_batch_size=4"]
    assert cli.main(["plan", "dense14b.dapo", "--set", *words]) == 2
    shown = capsys.readouterr()
    assert "logits" in shown.out
    assert "does not fit 8 GPUs of 80 GB" in shown.err


def test_the_table_of_sizes_has_a_row_for_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "moe.pg_seq_tis", "--all-sizes", "--json"]) == 0
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


def test_a_run_that_does_not_fit_is_refused_before_it_starts(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["train", "dense14b.dapo", "--dryrun", "--set", "rollout.kv_cache_mib=65536"]
    assert cli.main(words) == 2
    assert "rollout.kv_cache_mib=" in capsys.readouterr().err.partition("remedy")[2]


def test_context_parallelism_and_unequal_stages_are_refused_with_what_to_do(
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = ["model.num_hidden_layers=94", "parallel.pp_size=4", "parallel.cp_size=2"]
    assert cli.main(["plan", "moe.grpo_seq_mis", "--set", *words]) == 2
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
    cli.main(["plan", name, "--all-sizes"])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(printed) == 2 + 4
    text = (ROOT / README[name]).read_text(encoding="utf-8")
    assert "\n".join(printed) in text
