"""Real FP16 runs on two ranks that are killed, stopped or damaged, and go on from a checkpoint.

Overflows come before and after the kill: the loss scale starts above what the gradients bear, and
grows after every two good steps until they overflow again.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.e2e import real_jobs

pytestmark = pytest.mark.slow

# What differs between two processes that compute the same: clocks, and the memory they have used.
MEASURED = ("time_s", "sync/s", "sync/proof_s", "memory/peak_gib", "checkpoint/bytes")


def train_words(start: Path, out: str, *more: str, **changed: object) -> list[str]:
    values = {
        "train__iterations": 6,
        "train__dump_every": 1,
        "eval__every": 2,
        "loss_scale__initial": "fixed_start",
        "loss_scale__initial_scale": "2**24",
        "loss_scale__growth_interval": 2,
        "checkpoint__every": 3,
    }
    words = ["train", "sanity.tiny_dense", "--precision", "fp16", "--out", out, *more]
    words += ["--start-from", str(start)]
    return [*words, *real_jobs.settings(**(values | changed))]


@pytest.fixture(scope="module")
def straight(dense_start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six iterations in one go."""
    folder = tmp_path_factory.mktemp("straight")
    finished = real_jobs.torchrun(folder, 2, *train_words(dense_start, "run"))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return folder / "run"


@pytest.fixture(scope="module")
def resumed(dense_start: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """(the same run, killed after its fourth iteration and resumed; what the resume printed)."""
    folder = tmp_path_factory.mktemp("resumed")
    out = folder / "run"
    with real_jobs.started(
        real_jobs.torchrun_command(2, *train_words(dense_start, "run")), folder
    ) as job:
        real_jobs.wait_until(lambda: len(real_jobs.events(out, "iteration")) >= 4, job)
        real_jobs.wait_until((out / "checkpoints" / "000003").is_dir, job)
        ranks = real_jobs.find_ranks(Path("run"))
        assert ranks is not None
        real_jobs.kill_all(job, ranks)
    assert not (out / "checkpoints" / "000006").exists()
    finished = real_jobs.torchrun(folder, 2, *train_words(dense_start, "run", "--resume"))
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return out, finished.stdout


def computed(out: Path) -> list[dict[str, Any]]:
    """The events of a run but for clocks, and checkpoints, whose events wait for writers."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    events = [e for e in map(json.loads, lines) if e["event"] not in ("resume", "checkpoint")]
    return [
        {
            name: value
            for name, value in event.items()
            if name not in MEASURED and not name.startswith("time/") and "_per_s" not in name
        }
        for event in events
    ]


def test_the_run_overflows_before_the_kill_and_after_it(straight: Path) -> None:
    skipped = [step["precision/skipped"] for step in real_jobs.events(straight, "step")]
    assert len(skipped) == 12
    assert 0 < sum(skipped[:6]) < 6
    assert 0 < sum(skipped[6:]) < 6


def test_the_metrics_of_a_resumed_run_are_those_of_one_that_was_never_killed(
    straight: Path, resumed: tuple[Path, str]
) -> None:
    assert computed(resumed[0]) == computed(straight)
    (resume,) = real_jobs.events(resumed[0], "resume")
    assert (resume["iteration"], resume["checkpoint"]) == (3, "000003")
    assert (resume["damaged"], resume["not_identical"]) == ([], [])


def test_sampled_tokens_and_weights_of_every_iteration_are_the_same_bytes(
    straight: Path, resumed: tuple[Path, str]
) -> None:
    for iteration in range(6):
        for name in ("rollouts.safetensors", "weights/model.safetensors"):
            path = Path("dumps", f"{iteration:06d}", name)
            assert (resumed[0] / path).read_bytes() == (straight / path).read_bytes(), path
    for path in sorted((straight / "answers").iterdir()):
        assert (resumed[0] / "answers" / path.name).read_text() == path.read_text()


def contents(checkpoint: Path, scratch: Path) -> dict[str, Any]:
    """Every tensor and object of a checkpoint, by PyTorch's own converter."""
    dcp_to_torch_save(checkpoint, scratch)
    found: dict[str, Any] = torch.load(scratch, weights_only=False)
    return found


def test_weights_optimizer_and_loss_scale_end_bit_for_bit_the_same(
    straight: Path, resumed: tuple[Path, str], tmp_path: Path
) -> None:
    ends = [run / "checkpoints" / "000006" for run in (straight, resumed[0])]
    first, second = (contents(end, tmp_path / "whole.pt") for end in ends)
    tensors = {name for name, value in first.items() if isinstance(value, torch.Tensor)}
    for kind in ("optimizer.param.", "optimizer.exp_avg.", "optimizer.exp_avg_sq.", "decoder."):
        assert any(name.startswith(kind) for name in tensors)
    assert first.keys() == second.keys()
    assert [n for n in tensors if not torch.equal(first[n], second[n])] == []
    # Objects: the generators of both ranks.
    objects = {name: repr(first[name]) for name in first.keys() - tensors}
    assert {name.split("/")[0] for name in objects} >= {"ranks"}
    assert objects == {name: repr(second[name]) for name in objects}
    states = [json.loads((end / "trainer.json").read_text()) for end in ends]
    assert states[0]["loss_scale"]["value"] != 2.0**30
    for state in states:
        del state["elapsed_s"], state["files"]
    assert states[0] == states[1]


def test_the_console_says_where_it_goes_on(resumed: tuple[Path, str]) -> None:
    assert "resuming after 3 iterations, from run/checkpoints/000003" in resumed[1]
    assert "bit for bit" not in resumed[1]
    assert "4/6 | reward" in resumed[1]
    assert "3/6 | reward" not in resumed[1]


def test_a_complete_run_has_nothing_left_to_do(dense_start: Path, resumed: Any) -> None:
    folder = resumed[0].parent
    before = (resumed[0] / "metrics.jsonl").read_bytes()
    finished = real_jobs.torchrun(folder, 2, *train_words(dense_start, "run", "--resume"))
    assert finished.returncode == 0, finished.stderr
    assert "nothing left to do" in finished.stdout
    assert (resumed[0] / "metrics.jsonl").read_bytes() == before


def test_a_damaged_checkpoint_is_passed_over_and_another_layout_goes_on(
    dense_start: Path, straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    shutil.copytree(straight, out)
    newest = out / "checkpoints" / "000006" / "__0_0.distcp"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    words = train_words(dense_start, "run", "--resume", parallel__tp_size=1, train__iterations=7)
    finished = real_jobs.torchrun(tmp_path, 2, *words)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    assert "checkpoints/000006 is damaged" in finished.stdout
    assert "000006/__0_0.distcp: a file is not as it was written" in finished.stdout
    assert "resuming after 3 iterations" in finished.stdout
    assert "equal to rounding, not bit for bit: the trainer's layout" in finished.stdout

    iterations = real_jobs.events(out, "iteration")
    assert [event["iteration"] for event in iterations] == list(range(7))
    assert all(event["sync/verified"] == 1 for event in iterations)
    # The first three are those of the run; the fourth is computed otherwise, from the same weights.
    before = [event for event in computed(straight) if event["iteration"] < 3]
    assert computed(out)[: len(before)] == before
    old, new = real_jobs.events(straight, "iteration")[3], iterations[3]
    assert new["reward/mean"] == pytest.approx(old["reward/mean"], abs=0.15)
    # Its dump shows the weights that the checkpoint gave it: those of the straight run.
    weights = Path("dumps", "000003", "weights", "model.safetensors")
    assert (out / weights).read_bytes() == (straight / weights).read_bytes()


def test_the_converter_exports_a_trainers_checkpoint(straight: Path, tmp_path: Path) -> None:
    checkpoint = straight / "checkpoints" / "000003"
    module = ["-m", "tools.checkpoint_convert"]
    import sys

    for words in (["export", str(checkpoint), "hf"], ["verify", str(checkpoint), "hf"]):
        finished = real_jobs.run([sys.executable, *module, *words], tmp_path)
        assert finished.returncode == 0, finished.stdout + finished.stderr
    from safetensors.torch import load_file

    exported = load_file(tmp_path / "hf" / "model.safetensors")
    # A dump has the weights before its iteration, gathered from the ranks and not from the files.
    dumped = load_file(straight / "dumps" / "000003" / "weights" / "model.safetensors")
    assert exported.keys() == dumped.keys()
    assert [name for name in dumped if not torch.equal(exported[name], dumped[name])] == []
    assert (tmp_path / "hf" / "tokenizer.json").is_file()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_one_rank_has_all_save_and_end_and_the_run_goes_on(
    number: signal.Signals, dense_start: Path, straight: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    words = train_words(dense_start, "run", checkpoint__every=0)
    with real_jobs.started(real_jobs.torchrun_command(2, *words), tmp_path) as job:
        real_jobs.wait_until(lambda: len(real_jobs.events(out, "iteration")) >= 2, job)
        ranks = real_jobs.find_ranks(Path("run"))
        assert ranks is not None
        os.kill(ranks.pids[1], number)
        _, stderr = job.communicate(timeout=120)
    assert job.returncode == 1  # torchrun's, whatever its ranks' was
    assert "exitcode  : 75" in stderr
    assert f"stopped by {number.name} after" in stderr
    (end,) = real_jobs.events(out, "end")
    assert end["status"] == "stopped"
    done = len(real_jobs.events(out, "iteration"))
    assert 2 <= done < 6
    assert end["iteration"] == done
    assert (out / "checkpoints" / f"{done:06d}").is_dir()
    real_jobs.assert_nothing_left(ranks)
    if number is signal.SIGTERM:
        finished = real_jobs.torchrun(tmp_path, 2, *train_words(dense_start, "run", "--resume"))
        assert finished.returncode == 0, finished.stdout + finished.stderr
        kept = ("iteration", "step", "eval")
        assert [e for e in computed(out) if e["event"] in kept] == [
            e for e in computed(straight) if e["event"] in kept
        ]
