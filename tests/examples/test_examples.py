"""The three examples: their dry runs, what they compute, and every way in which such a file fails.

Whole runs of them: tests/e2e/test_examples.py.
"""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import recipes
from megatron_precision.actor.batch import Batch
from megatron_precision.checks import own_code
from megatron_precision.cli.main import main
from megatron_precision.config.schema import AlgorithmConfig
from megatron_precision.rewards.grading import PooledGrader, Response
from megatron_precision.rewards.scorers import scorer
from megatron_precision.rl.algorithms import algorithm
from megatron_precision.train.objective import policy_objective

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
RECIPE = "examples/my_recipe.py"
SCORER = f"{EXAMPLES}/my_scorer.py:close"
CISPO = f"{EXAMPLES}/my_algorithm.py:CISPO"


@pytest.mark.parametrize("front", [["launch.py"], ["-m", "megatron_precision", "train"]])
def test_a_recipe_is_started_by_its_path(front: list[str], tmp_path: Path) -> None:
    words = [RECIPE, "--precision", "bf16", "--algo", "examples/my_algorithm.py:CISPO"]
    options = ["--set", "seed=7", "--out", str(tmp_path / "run"), "--dryrun"]
    done = subprocess.run(
        [sys.executable, *front, *words, *options],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    config = json.JSONDecoder().raw_decode(done.stdout)[0]
    assert config["recipe"] == "my_recipe.py"
    assert (config["precision"], config["seed"]) == ("bf16", 7)
    assert (config["task"]["difficulty"], config["train"]["iterations"]) == (4, 8)
    # The ranks read the file wherever they run.
    assert config["algo"]["name"] == CISPO


def test_a_scorer_is_called_in_worker_processes() -> None:
    grader = PooledGrader(scorer(SCORER), workers=1, time_limit_s=30.0)
    try:
        rewards = [
            grader.submit(Response("a test", text, "20", truncated=False)).result().reward
            for text in ("it is 20", "it is 21", "it is 30", "no number")
        ]
    finally:
        grader.close()
    assert rewards == [1.0, 0.5, 0.0, 0.0]


def test_an_algorithm_computes_the_published_loss_and_keeps_a_clipped_tokens_gradient() -> None:
    """Two responses of one token by hand: ratios 1.5 (clipped at 1.28) and 0.5, A = 1 and -2."""
    row = algorithm(CISPO)
    assert row.needs_old_logprobs
    old = torch.tensor([[-1.0], [-1.0]])
    train = (old + torch.tensor([[math.log(1.5)], [math.log(0.5)]])).requires_grad_()
    batch = Batch(
        tokens=torch.zeros(2, 1, dtype=torch.int64),
        response_mask=torch.ones(2, 1, dtype=torch.bool),
        lengths=torch.ones(2, dtype=torch.int64),
        rollout_logprobs=old,
        advantages=torch.tensor([1.0, -2.0]),
        old_logprobs=old,
    )
    objective = policy_objective(row, AlgorithmConfig(CISPO), batch, torch.arange(2), 4)
    loss = objective(batch, train, torch.zeros(2, 1))
    by_hand = -(1.28 * 1.0 * (-1.0 + math.log(1.5)) + 0.5 * -2.0 * (-1.0 + math.log(0.5))) / 2
    assert loss.loss.item() == pytest.approx(by_hand, rel=1e-6)
    assert loss.sums["clipped"] == 1.0
    loss.loss.backward()
    assert train.grad is not None
    assert train.grad.flatten().tolist() == pytest.approx([-1.28 / 2, 0.5 * 2.0 / 2])


BROKEN = {
    "a missing file": (None, "there is no such file", None),
    "a syntax error": ("x = 1\ndef recipe(:\n", "not valid Python", 2),
    "an error on import": ("x = 1\n\nraise RuntimeError('a mistake')\n", "raises", 3),
    "a missing name": ("x = 1\n", "the file has no", None),
}
WRONG = {
    "recipe": ("def recipe():\n    return 3\n", "returns no configuration", 1),
    "scorer": ("close = 3\n", "not a scorer", None),
    "algorithm": ("CISPO = 3\n", "not an algorithm", None),
}


@pytest.mark.parametrize("kind", ["recipe", "scorer", "algorithm"])
@pytest.mark.parametrize("fault", [*BROKEN, "another type"])
def test_a_file_that_cannot_be_used_is_refused_with_its_line(
    kind: str, fault: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text, message, line = WRONG[kind] if fault == "another type" else BROKEN[fault]
    path = tmp_path / f"my_{kind}.py"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    words = {
        "recipe": [str(path)],
        "scorer": ["sanity.tiny_dense", "--set", f"task.scorer={path}:close"],
        "algorithm": ["sanity.tiny_dense", "--algo", f"{path}:CISPO"],
    }[kind]
    assert main(["train", *words, "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error
    if line is not None:
        assert re.search(rf"line {line}\b", error)
    assert not (tmp_path / "run").exists()


def test_every_problem_is_told_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--algo", f"{tmp_path}/none.py:A", "--out", str(tmp_path / "run")]
    words += ["--set", f"task.scorer={tmp_path}/no.py:f", "seed=-1"]
    assert main(["train", "sanity.tiny_dense", *words]) == 2
    error = capsys.readouterr().err
    assert "3 problems" in error
    for text in ("none.py", "no.py", "seed"):
        assert text in error
    # Without a recipe nothing says whether its settings fit each other, but the files are known.
    assert main(["train", f"{tmp_path}/nor.py", *words]) == 2
    error = capsys.readouterr().err
    assert "3 problems" in error
    for text in ("none.py", "no.py", "nor.py"):
        assert text in error


LOSS = """
from megatron_precision.rl.algorithms import Algorithm

def loss(inputs, constants):
    return {}

CISPO = Algorithm("CISPO", loss, "none", "token-mean", "nowhere")
"""


@pytest.mark.parametrize(
    ("text", "message", "line"),
    [
        (LOSS.format("-inputs.advantages"), "loss returns the wrong type", 4),
        (LOSS.format("inputs.no_such_tensor"), "AttributeError", 5),
        (LOSS.replace('"none"', '"non"'), "unknown correction 'non'", None),
    ],
)
def test_an_algorithm_is_tried_before_it_is_used(
    text: str, message: str, line: int | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(text, encoding="utf-8")
    out = str(tmp_path / "run")
    assert main(["train", "sanity.tiny_dense", "--algo", f"{path}:CISPO", "--out", out]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(path) in error
    assert line is None or f"line {line}\n" in error


def test_a_recipe_that_raises_is_refused_with_the_line_that_raised(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def recipe():\n    return later()\n\n\ndef later():\n    1 / 0\n", "utf-8")
    assert main(["train", str(path), "--dryrun"]) == 2
    error = capsys.readouterr().err
    assert "recipe raises" in error
    assert f"{path}, line 6\n" in error
    assert "ZeroDivisionError" in error


@pytest.mark.parametrize(
    ("body", "message", "line"),
    [
        ("return answer", "the scorer returned '7', expected a number", 1),
        ("return float('nan')", "expected a finite number", 1),
        ("return float(response)", "could not convert string to float", 2),
    ],
)
def test_a_scorer_is_tried_on_an_empty_response(
    body: str, message: str, line: int, tmp_path: Path
) -> None:
    path = tmp_path / "mine.py"
    path.write_text(f"def score(response, answer):\n    {body}\n", encoding="utf-8")
    config = recipes.build("sanity.tiny_dense", overrides=[f"task.scorer={path}:score"])
    assert own_code.scorer_problems(config) == []
    (problem,) = own_code.try_scorer(config, "7")
    assert message in problem.got
    assert problem.where == f"task.scorer, {path}, line {line}"


def test_a_loss_without_a_gradient_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "flat.py"
    text = (EXAMPLES / "my_algorithm.py").read_text(encoding="utf-8")
    path.write_text(text.replace("* inputs.train_logprobs,", "* inputs.old_logprobs,"), "utf-8")
    words = ["train", "sanity.tiny_dense", "--algo", f"{path}:CISPO", "--out", str(tmp_path / "r")]
    assert main(words) == 2
    assert "no gradient" in capsys.readouterr().err
