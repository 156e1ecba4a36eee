"""What is wrong with a launch: all of it at once, exit code 2, and nothing submitted."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

import recipes
from megatron_precision.cli import launch
from megatron_precision.layouts.hf_config import hf_config

ROOT = Path(__file__).resolve().parents[2]
DENSE = "sanity.tiny_dense"
SLURM = [DENSE, "--executor", "slurm", "--dryrun"]
ANSWER_S = 1.0  # of processor time, which a busy machine stretches least


@pytest.fixture(autouse=True)
def nobody_elses_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SLURM_ACCOUNT", "SLURM_PARTITION", "CONTAINER_IMAGE", "KUBECONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)


def refused(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    """What is said of a launch that must be refused."""
    assert launch.main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    return shown.err


def test_every_problem_is_listed_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(
        capsys, "sanity.tiny_dens", "--executor", "slurm", "--nodes", "two", "--gpus", "few",
        "--gpus-per-node", "0", "--time", "soon", "--partition", "a b", "--mount", "/a b:/c",
        "--mount", "data", "--env", "KEY=sesame-4711", "--env", "2BAD", "--srun-arg=mpi",
        "--retries", "-1", "--restarts", "x", "--experiment-name", "a/b", "--container-image",
        "an image", "--wait", "--detach", "--nods", "3", "train.iteration=4", "seed=x",
    )  # fmt: skip
    assert "error: 21 problems" in said
    for wrong in (
        "unknown option", "did you mean --nodes", "wrong value for --nodes",
        "wrong value for --gpus",
        "wrong value for --gpus-per-node", "wrong value for --time", "wrong value for --partition",
        "a mount with a character", "no absolute path", "KEY=...", "2BAD", "--mpi=pmix",
        "wrong value for --retries", "wrong value for --restarts",
        "wrong value for --experiment-name",
        "wrong value for --container-image", "waiting and not waiting", "unknown recipe",
        "train.iterations", "wrong value for seed", "no folder for the run",
    ):  # fmt: skip
        assert wrong in said, said
    assert "sesame" not in said  # it may be a secret


@pytest.mark.parametrize(
    ("argv", "hints"),
    [
        (["--executor", "slurmm"], ["unknown executor", "did you mean slurm?"]),
        (["--nodes", "2"], ["--nodes does not belong", "--executor slurm", "torchrun by hand"]),
        (["--partition", "p"], ["--partition does not belong", "--executor local"]),
        (["--account", "a"], ["--account does not belong"]),
        (["--time", "10"], ["--time does not belong"]),
        (["--srun-arg=--mpi=x"], ["--srun-arg does not belong"]),
        (["--restarts", "1"], ["--restarts does not belong"]),
        (["--array", "2"], ["--array does not belong"]),
        (
            ["--executor", "slurm", "--array", "2", "--restarts", "1"],
            ["two ways to go on after a time limit", "--array, --restarts"],
        ),
        (["--retries", "1"], ["--retries does not belong"]),
        (["--container-image", "x"], ["--container-image does not belong"]),
        (["--mount", "/x"], ["--mount does not belong"]),
        (["--env", "HOME"], ["--env does not belong", "has the environment of launch.py"]),
        (["--detach"], ["--detach does not belong"]),
        (["--executor", "docker", "--container-image", "x", "--env", "HOME"], ["~/.netrc"]),
        (["--executor", "docker"], ["runs in a container", "--container-image"]),
        (["--executor", "slurm", "--mount", "/x"], ["mounts without a container"]),
        (["--executor", "slurm", "--nodes", "3"], ["3 x 0 = 0", "parallel.world_size, which is 2"]),
        (
            ["--executor", "slurm", "--nodes", "2", "--gpus-per-node", "8"],
            ["2 x 8 = 16", "parallel.world_size, which is 2", "--gpus N"],
        ),
        (
            ["--executor", "slurm", "--nodes", "2"],
            ["an engine would be divided", "2 on machines of 1", "parallel.rollout_tp_size"],
        ),
        (["--srun-arg", "--mpi=x"], ["--srun-arg=--mpi=pmix"]),
        (["--executor", "kubeflow", "--container-image", "x"], ["workdir_pvc", "KUBECONFIG"]),
        (["--site", "nowhere.toml"], ["cannot read the site file"]),
        (["--exec", "slurm"], ["unknown option", "did you mean --executor"]),
        (["another"], ["an override without a value"]),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    capsys: pytest.CaptureFixture[str], argv: list[str], hints: list[str]
) -> None:
    said = refused(capsys, DENSE, "--dryrun", *argv)
    for hint in hints:
        assert hint in said, said


@pytest.mark.parametrize(
    ("text", "hints"),
    [
        ("partition = 3\nacount = 'x'\n", ["a string", "did you mean account"]),
        ("[slurm]\nqos = 'high'\nrequest_gpus = 'no'\n", ["slurm.qos", "true or false"]),
        ("mounts = ['/a b']\n[docker]\n", ["site.toml: mounts"]),
        ("partition = \n", ["not TOML"]),
        ("slurm = 'x'\n", ["not a section"]),
        ("env = ['KEY=sesame']\n", ["KEY=...", "site.toml: env"]),
    ],
)
def test_mistakes_of_the_sites_file_are_listed_with_its_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, hints: list[str]
) -> None:
    path = tmp_path / "site.toml"
    path.write_text(text, encoding="utf-8")
    said = refused(capsys, *SLURM, "--container-image", "x", "--site", str(path))
    for hint in hints:
        assert hint in said, said
    assert "sesame" not in said


def test_folders_with_spaces_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, *SLURM, "--out", "runs/my run")
    assert "a folder with a character that container options cannot carry" in said
    assert "runs/my run" in said
    said = refused(capsys, *SLURM, "--out", "/data/nemo_run/x")
    assert "nemo-run would rename" in said


def test_what_a_run_reads_is_looked_for_before_anything_is_submitted(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = [DENSE, "--executor", "slurm", "--out", "run", "--env", "NO_SUCH_VARIABLE"]
    sets = ["task.name=chat", "start.kind=checkpoint", "task.train_sets=a=nowhere.jsonl"]
    said = refused(capsys, *argv, *sets, "start.checkpoint=nowhere")
    for missing in ("nowhere/config.json", "nowhere.jsonl", "NO_SUCH_VARIABLE, which is not set"):
        assert missing in said, said
    model = tmp_path / "model"
    model.mkdir()
    config = hf_config(recipes.build(DENSE).model, "bfloat16")
    (model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    said = refused(capsys, *argv, *sets, "start.checkpoint=model")
    assert "no weights" in said
    assert "model.safetensors" in said
    assert not (tmp_path / "run").exists()


def test_a_file_is_looked_for_where_the_host_has_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    argv = [DENSE, "--executor", "slurm", "--out", "run", "--container-image", "x"]
    sets = ["task.name=chat", "start.kind=checkpoint", "start.checkpoint=/models/tiny"]
    said = refused(capsys, *argv, *sets, "--mount", f"{tmp_path}:/models")
    assert f"{tmp_path}/tiny/config.json" in said


def test_no_slurm_is_said_before_the_folder_is_made(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = refused(capsys, DENSE, "--executor", "slurm", "--out", "run")
    assert "no Slurm on this machine" in said
    assert not (tmp_path / "run").exists()


def test_the_answer_comes_within_a_second_and_without_nemo_run(tmp_path: Path) -> None:
    words = [DENSE, "--executor", "slurm", "--nodes", "5", "--out", "run", "--partition", "a b"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    seconds = []
    for options in ([], [], ["-X", "importtime"]):
        began = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, *options, str(ROOT / "launch.py"), *words],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(ended.ru_utime - began.ru_utime + ended.ru_stime - began.ru_stime)
        assert done.returncode == 2
        assert "Traceback" not in done.stderr
    imported = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "megatron_precision.launch.options" in imported
    assert not imported & {"torch", "nemo_run", "torchx", "megatron.core", "vllm"}
    assert min(seconds) < ANSWER_S
    assert list(tmp_path.iterdir()) == []


def test_what_only_a_gpu_can_do_is_refused_before_anything_starts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    words = ["--set", "kernels.fused_weight_gradients=true", "memory.engine_sleep=keep_weights"]
    said = refused(capsys, DENSE, "--out", str(tmp_path / "run"), *words)
    for name in ("kernels.fused_weight_gradients=false", "memory.engine_sleep=off"):
        assert f"remedy:   --set {name}, or a GPU host" in said
    assert not (tmp_path / "run").exists()
