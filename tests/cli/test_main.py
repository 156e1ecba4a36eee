"""The command line answers mistakes at once, without an engine, and with exit code 2."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from megatron_precision.checkpoint import run_folder
from megatron_precision.cli import main
from megatron_precision.config.schema import to_dict

ROOT = Path(__file__).resolve().parents[2]
HEAVY = ("torch", "megatron", "vllm", "nemo_run", "transformers", "matplotlib")
# The target is a second; a slow machine gets some room. Of processor time, whoever else works here.
ANSWER_S = 1.5


def run(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=60,
    )


def heavy_imports_of(argv: Sequence[str]) -> list[str]:
    code = (
        "import sys\n"
        "from megatron_precision.cli.main import main\n"
        "try:\n"
        f"    main({list(argv)!r})\n"
        "except SystemExit:\n"
        "    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr)\n"
    )
    return json.loads(run("-c", code).stderr.splitlines()[-1].replace("'", '"'))


def test_a_misspelt_command_gets_the_nearest() -> None:
    done = run("-m", "megatron_precision", "perfectable", "sanity.tiny_dense")
    assert done.returncode == 2
    assert "did you mean perfectible" in done.stderr
    assert "mismatch-part" not in done.stderr  # our own jobs' alone


@pytest.mark.parametrize("command", ["", "train", "prepare", "sanity", "report", "doctor"])
def test_help_comes_within_a_second(command: str) -> None:
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = run("-m", "megatron_precision", *command.split(), "--help")
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert done.returncode == 0
        assert done.stdout.startswith("usage:")
    assert min(seconds) < ANSWER_S


@pytest.mark.parametrize(
    "argv",
    [
        ["train", "--help"],
        ["train", "sanity.tiny_dense", "--dryrun"],
        ["train", "sanity.tiny_dens", "--out", "x"],
        ["train", "sanity.tiny_dense", "--start-from", "/nope", "--dryrun"],
        ["report", "nowhere"],
    ],
)
def test_nothing_heavy_is_imported_to_answer(argv: list[str]) -> None:
    assert heavy_imports_of(argv) == []


@pytest.mark.parametrize(
    ("words", "hints"),
    [
        (["sanity.tiny_dens"], ["unknown recipe", "sanity.tiny_dense", "sanity.tiny_moe"]),
        (
            ["sanity.tiny_dense", "--algo", "grpo-seq-mis"],
            ["unknown algorithm", "it is PPO-Seq-MIS"],
        ),
        (["sanity.tiny_dense", "--algo", "PG-Seq-SI"], ["unknown algorithm", "PG-Seq-IS", "PPO"]),
        (["sanity.tiny_dense", "--precision", "pf16"], ["unknown precision", "fp16", "bf16"]),
        (["sanity.tiny_dense", "--set", "trian.iterations=1"], ["train.iterations"]),
        (
            ["sanity.tiny_dense", "--set", "parallel.tp_size=3"],
            ["3 problems", "2 / 3", "parallel.tp_size"],
        ),
        ([], ["no recipe", "sanity.tiny_moe"]),
        (
            ["--set", "seed=1", "sanity.tiny_moe"],
            ["no recipe", "the recipe first: sanity.tiny_moe"],
        ),
        (["sanity.tiny_dense", "--set", "tran.x=1"], ["unknown override", "train.iterations"]),
        (["sanity.tiny_dense", "--set", "loss_scale.initial=author"], ["did you mean authors?"]),
        (["sanity.tiny_dense", "--set", "train.iterations=2**400"], ["an integer of 64 bits"]),
        (
            # Everything at once: options, values, layout, sampling and folders.
            [
                "sanity.tiny_dense",
                "--algo",
                "POP",
                "--start-from",
                "/nope",
                "--set",
                "seed=x",
                "parallel.tp_size=3",
                "rollout.top_p=0.9",
            ],
            [
                "7 problems",
                "did you mean PPO or DAPO?",
                "seed",
                "2 / 3",
                "top_p",
                "no prepared start",
            ],
        ),
    ],
)
@pytest.mark.parametrize("front", [["-m", "megatron_precision", "train"], ["launch.py"]])
def test_a_mistake_ends_in_exit_code_2_with_what_would_be_right(
    front: list[str], words: list[str], hints: list[str]
) -> None:
    done = run(*front, *words, "--out", "runs/never")
    assert done.returncode == 2
    assert not (ROOT / "runs/never").exists()
    assert "Traceback" not in done.stderr
    for hint in hints:
        assert hint in done.stderr


def test_a_dry_run_refuses_the_folders_that_a_run_would_refuse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / run_folder.CONFIG).touch()
    argv = ["train", "sanity.tiny_dense", "--dryrun", "--out", str(tmp_path)]
    assert main.main([*argv, "--start-from", "/nope"]) == 2
    shown = capsys.readouterr().err
    for wrong in ("2 problems", "--overwrite", "--resume", "/nope"):
        assert wrong in shown
    assert main.main([*argv, "--resume", "--overwrite"]) == 2
    assert "both resumed and replaced" in capsys.readouterr().err
    assert main.main([*argv, "--resume"]) == 0
    assert f"--out {tmp_path} --resume" in capsys.readouterr().out
    assert main.main([*argv, "--overwrite"]) == 0
    assert f"--out {tmp_path} --overwrite" in capsys.readouterr().out
    assert (tmp_path / run_folder.CONFIG).exists()


def test_a_layout_of_two_needs_torchrun_and_says_what_to_type() -> None:
    done = run("-m", "megatron_precision", "prepare", "sanity.tiny_dense", "--algo", "PPO")
    assert done.returncode == 2
    assert (
        "torchrun --standalone --nproc-per-node 2 -m megatron_precision "
        "prepare sanity.tiny_dense --algo PPO" in done.stderr
    )


def test_another_number_of_processes_than_the_layout_has_is_refused() -> None:
    done = run("-m", "megatron_precision", "prepare", "sanity.tiny_dense", WORLD_SIZE="3", RANK="0")
    assert done.returncode == 2
    assert "3 processes" in done.stderr


def test_only_rank_0_prints_a_user_error() -> None:
    done = run("-m", "megatron_precision", "train", "no.recipe", WORLD_SIZE="2", RANK="1")
    assert done.returncode == 2
    assert done.stderr == ""


def test_a_dry_run_prints_the_resolved_configuration_and_the_commands(
    capsys: pytest.CaptureFixture[str],
) -> None:
    argv = ["train", "sanity.tiny_moe", "--precision", "bf16", "--mismatch-every", "3"]
    assert main.main([*argv, "--set", "seed=7", "train.iterations=2", "--dry-run"]) == 0
    text = capsys.readouterr().out
    values = json.loads(text[: text.index("would run:")])
    assert values["recipe"] == "sanity.tiny_moe"
    assert (values["precision"], values["seed"]) == ("bf16", 7)
    assert (values["train"]["iterations"], values["train"]["mismatch_every"]) == (2, 3)
    prepare, train = text[text.index("would run:") :].splitlines()[1:]
    assert "prepare sanity.tiny_moe --precision bf16" in prepare
    assert "train sanity.tiny_moe --precision bf16" in train
    assert "--set seed=7 train.iterations=2" in train


def test_a_resolved_configuration_file_stands_for_a_recipe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import recipes

    config = recipes.build("sanity.tiny_moe", "bf16", overrides=["seed=9"])
    path = run_folder.write_config(config, tmp_path)
    assert main.main(["train", "--config", str(path), "--set", "seed=10", "--dryrun"]) == 0
    text = capsys.readouterr().out
    values = json.loads(text[: text.index("would run:")])
    assert values == {**to_dict(config), "seed": 10}


def test_torchrun_takes_none_of_our_options_for_an_abbreviation_of_its_own() -> None:
    from torch.distributed.run import get_args_parser

    options = "--config --precision --algo --set --mismatch-every --dryrun --dry-run --out"
    options += " --overwrite --resume --start-from --claimed --model --gpus --gpu-gb"
    for command in ("train", "prepare"):
        shown = run("-m", "megatron_precision", command, "--help").stdout
        found = {word.strip("[],") for word in shown.split() if word.startswith(("--", "[--"))}
        assert found <= {*options.split(), "--help"}, "list the new option above"
    for option in options.split():
        words = ["--standalone", "-m", "megatron_precision", "train", option, "value"]
        parsed = get_args_parser().parse_args(words)
        assert parsed.training_script_args == ["train", option, "value"]


def test_an_existing_run_is_refused_unless_it_may_be_overwritten(tmp_path: Path) -> None:
    import recipes
    from megatron_precision.config.errors import UserError

    out = tmp_path / "run"
    run_folder.claim(out)
    run_folder.claim(out)  # an empty folder is free
    run_folder.write_config(recipes.build("sanity.tiny_dense"), out)
    with pytest.raises(UserError, match="--overwrite"):
        run_folder.claim(out)
    run_folder.claim(out, resume=True)  # what is there stays
    assert (out / run_folder.CONFIG).exists()
    run_folder.claim(out, overwrite=True)
    assert list(out.iterdir()) == []


def test_overwrite_removes_nothing_but_runs(tmp_path: Path) -> None:
    from megatron_precision.config.errors import UserError

    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match="removes runs only"):
        run_folder.claim(tmp_path, overwrite=True)
    assert (tmp_path / "thesis.tex").exists()


def test_only_a_run_can_be_resumed(tmp_path: Path) -> None:
    from megatron_precision.config.errors import UserError

    (tmp_path / "thesis.tex").write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match="nothing to resume"):
        run_folder.claim(tmp_path, resume=True)
    run_folder.claim(tmp_path / "new", resume=True)  # it begins there
    assert (tmp_path / "new").is_dir()


def checkpoint_of(out: Path, *overrides: str) -> None:
    """A run in `out` that has a checkpoint after three iterations, as far as a command looks."""
    import recipes

    config = recipes.build("sanity.tiny_dense", overrides=list(overrides))
    run_folder.claim(out)
    run_folder.write_config(config, out)
    folder = out / "checkpoints" / "000003"
    folder.mkdir(parents=True)
    state = {"version": 1, "iteration": 3, "config": to_dict(config), "versions": {}}
    (folder / "trainer.json").write_text(json.dumps(state), encoding="utf-8")


def test_a_resume_that_would_be_another_run_is_refused_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint_of(tmp_path / "run")
    argv = ["train", "sanity.tiny_dense", "--out", str(tmp_path / "run"), "--dryrun", "--resume"]
    assert main.main([*argv, "--set", "train.iterations=99", "parallel.tp_size=1"]) == 0
    capsys.readouterr()
    assert main.main([*argv, "--set", "seed=7", "optimizer.learning_rate=1.0"]) == 2
    shown = capsys.readouterr().err
    assert "2 problems" in shown
    assert "seed" in shown
    assert "optimizer.learning_rate" in shown
    assert heavy_imports_of(argv) == []


def test_a_job_that_was_restarted_resumes_its_run_and_overwrites_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_of(tmp_path / "run")
    argv = ["train", "sanity.tiny_dense", "--out", str(tmp_path / "run"), "--dryrun"]
    assert main.main(argv) == 2
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    capsys.readouterr()
    assert main.main([*argv, "--overwrite"]) == 0
    shown = capsys.readouterr().out
    assert "--resume" in shown
    assert "--overwrite" not in shown
    assert main.main([*argv, "--overwrite", "--set", "seed=7"]) == 2


def test_an_earlier_result_is_kept_once(tmp_path: Path) -> None:
    out = tmp_path / "sanity-dense"
    assert run_folder.set_aside(out) is None
    for name in ("first", "second"):
        out.mkdir()
        (out / name).touch()
        assert run_folder.set_aside(out) == tmp_path / "sanity-dense.previous"
    assert [path.name for path in tmp_path.rglob("*")] == ["sanity-dense.previous", "second"]
