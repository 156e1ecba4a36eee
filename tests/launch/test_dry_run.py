"""What a dry run prints for each executor, with no such service at hand.

Not covered: whether a cluster takes it (tests/cluster runs the Slurm script).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_precision.cli import launch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SECRET = "sesame-4711"
SITE = """
partition = "from-site"
mounts = ["/lustre/data:/data:ro"]
env = ["WANDB_API_KEY"]
[slurm]
sbatch = { qos = "high" }
[docker]
shm_size = "64g"
"""
LARGE = ["dense14b.dapo", "--gpus", "16", "--dryrun", "--out", "/lustre/runs/x"]
LAUNCHES = {
    "plain": [
        "sanity.tiny_dense", "--executor", "slurm", "--nodes", "1", "--dryrun", "--out", "runs/x",
        "--restarts", "2", "--retries", "1", "--time", "10", "train.iterations=7",
    ],
    "container": [
        *LARGE, "--executor", "slurm", "--nodes", "2", "--gpus-per-node", "8", "--account", "acct",
        "--container-image", "nvcr.io/x/y:1.0", "--site", "site.toml", "--srun-arg=--mpi=pmix",
        "--array", "3", "--experiment-name", "first-try", "start.checkpoint=/data/model",
    ],
    "docker": [
        "sanity.tiny_dense", "--executor", "docker", "--container-image", "x/y:1", "--dryrun",
        "--mount", "/models", "--site", "site.toml", "--out", "runs/x", "--retries", "2",
    ],
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made: Path = tmp_path_factory.mktemp("dry")
    (made / "site.toml").write_text(SITE, encoding="utf-8")
    return made


@pytest.fixture(scope="module")
def said(folder: Path) -> dict[str, Any]:
    ours = ("SLURM_ACCOUNT", "SLURM_PARTITION", "CONTAINER_IMAGE", "NEMORUN_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    environment |= {
        "PYTHONPATH": str(ROOT), "XDG_CONFIG_HOME": str(folder), "WANDB_API_KEY": SECRET,
        "SLURM_PARTITION": "from-environment", "PATH": "/usr/bin:/bin",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(HERE / "dry_runs.py")], input=json.dumps(LAUNCHES),
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_a_dry_run_here_needs_no_machine_of_that_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["dense14b.dapo", "--gpus", "16", "--dryrun"]) == 0
    assert "torchrun --standalone --nproc-per-node 16" in capsys.readouterr().out


def script(said: dict[str, Any], name: str) -> str:
    assert said[name]["code"] == 0, said[name]["err"]
    return str(said[name]["out"])


def test_the_resolved_configuration_comes_first(said: dict[str, Any]) -> None:
    text = script(said, "plain")
    values = json.loads(text[: text.index("\nwould submit")])
    assert values["train"]["iterations"] == 7


def test_a_slurm_script_asks_for_what_was_said(said: dict[str, Any]) -> None:
    text = script(said, "container")
    lines = set(re.findall(r"#SBATCH --(\S+)", text))
    wanted = "account=acct nodes=2 ntasks-per-node=1 gpus-per-node=8 time=04:00:00 qos=high"
    assert lines >= {*wanted.split(), "signal=TERM@300", "job-name=first-try.train", "exclusive"}
    assert "array=1-3%1" in lines
    assert "partition=from-environment" in lines  # which goes before the site's file
    assert "--container-image nvcr.io/x/y:1.0" in text
    assert "--mpi=pmix torchrun" in text
    assert "--container-env WANDB_API_KEY" in text
    assert re.search(r"#SBATCH --export=\S*WANDB_API_KEY", text)


def test_a_container_sees_what_the_run_names_and_no_more(said: dict[str, Any]) -> None:
    (mounts,) = re.findall(r"--container-mounts (\S+)", script(said, "container"))
    sources = [mount.partition(":")[0] for mount in mounts.split(",")]
    assert "/lustre/data:/data:ro" in mounts
    assert {str(ROOT), "/lustre/runs/x"} <= set(sources)
    # The checkpoint is under a mount already.
    assert "/data/model" not in mounts


def test_the_torchrun_line_has_the_configuration_as_a_file(said: dict[str, Any]) -> None:
    *_, last = script(said, "container").strip().splitlines()
    assert last.strip().startswith("torchrun --rdzv-backend c10d --rdzv-endpoint $head_node_ip:")
    assert "--nnodes 2 --nproc-per-node 8" in last
    end = "-m megatron_precision train --config /lustre/runs/x/config.json"
    assert last.endswith(f"{end} --out /lustre/runs/x --claimed")


def test_a_warm_start_is_made_by_a_job_before(said: dict[str, Any]) -> None:
    text = script(said, "plain")
    prepare, train = text.split("would submit (train)")
    assert "megatron_precision prepare --config runs/cache/" in prepare
    assert "kill-on-invalid-dep" not in prepare
    assert "#SBATCH --kill-on-invalid-dep=yes" in train


def test_restarts_and_a_short_limit_are_rendered(said: dict[str, Any]) -> None:
    text = script(said, "plain")
    assert "export TORCHX_MAX_RETRIES=3" in text
    assert "\nretries=1\n" in text
    assert "#SBATCH --signal=TERM@120" in text  # a fifth of ten minutes
    assert "export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=108" in text


def test_no_value_of_the_environment_is_written(said: dict[str, Any], folder: Path) -> None:
    assert SECRET not in json.dumps(said)
    # A dry run leaves nothing.
    assert [path.name for path in folder.iterdir()] == ["site.toml"]


def test_docker_is_rendered(said: dict[str, Any], folder: Path) -> None:
    text = script(said, "docker")
    assert "container_image: x/y:1" in text
    assert "/models:/models" in text
    assert "/lustre/data:/data:ro" in text
    assert "shm_size: 64g" in text
    assert "retries: 2" in text
    assert f"{folder}:/nemo_run/code" in text
    *_, last = text.strip().splitlines()
    assert "torchrun" in last
    assert last.endswith("train --config runs/x/config.json --out runs/x --claimed")
