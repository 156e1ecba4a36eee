"""A run with one's own recipe, algorithm and scorer; a resume notices a changed file."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e import real_jobs
from tests.e2e.chat_start import write_prompts
from tests.e2e.test_chat import CHAT, HERE

pytestmark = pytest.mark.slow
EXAMPLES = real_jobs.ROOT / "examples"


def test_three_files_of_ones_own_train_and_a_resume_notices_that_one_changed(
    tmp_path: Path,
) -> None:
    maker = [sys.executable, str(HERE / "chat_start.py"), str(tmp_path)]
    subprocess.run(maker, check=True, env=real_jobs.environment())
    write_prompts(tmp_path / "numbers.jsonl", [(f"a{n}b{n + 1}", str(2 * n)) for n in range(12)])
    own = tmp_path / "own"
    shutil.copytree(EXAMPLES, own)
    settings = CHAT | {
        "task.train_sets": "numbers=numbers.jsonl",
        "task.eval_sets": "",
        "task.difficulty": "8",
        "task.scorer": f"{own}/my_scorer.py:close",
        "train.iterations": "1",
        "checkpoint.every": "1",
    }
    words = ["train", f"{own}/my_recipe.py", "--algo", f"{own}/my_algorithm.py:CISPO"]
    words += ["--set", *(f"{name}={value}" for name, value in settings.items())]
    done = real_jobs.torchrun(tmp_path, 2, *words, "--out", "run")
    assert done.returncode == 0, done.stdout + done.stderr
    (event,) = real_jobs.events(tmp_path / "run", "run")
    assert event["config"]["recipe"] == "my_recipe.py"
    assert event["config"]["algo"]["name"].endswith("my_algorithm.py:CISPO")
    (end,) = real_jobs.events(tmp_path / "run", "end")
    assert end["status"] == "completed"

    scorer = own / "my_scorer.py"
    scorer.write_text(scorer.read_text(encoding="utf-8") + "\n# changed\n", encoding="utf-8")
    done = real_jobs.torchrun(tmp_path, 2, *words, "train.iterations=2", "--out", "run", "--resume")
    assert done.returncode != 0
    assert "a resumed run cannot change this file" in done.stderr
    assert "my_scorer.py" in done.stderr
