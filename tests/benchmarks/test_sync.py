"""`python -m benchmarks.sync`: a sync on real processes, and what does not fit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.sync.__main__ import main


def test_weights_that_do_not_fit_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "qwen3-14b"]) == 2
    error = capsys.readouterr().err
    assert "do not fit into this machine's memory" in error
    assert "--layers" in error


def test_it_is_executed_on_processes_of_its_own(tmp_path: Path) -> None:
    """Two of them, on a model that the converter left in Megatron's format."""
    (tmp_path / "huggingface").mkdir()
    (tmp_path / ".metadata").touch()
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 512,
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "huggingface" / "config.json").write_text(json.dumps(config))
    line = [sys.executable, "-m", "benchmarks.sync", "--model", str(tmp_path)]
    line += ["--train", "tp=2", "--rollout", "tp=1,dp=2", "--rounds", "2", "--json"]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    # Half of what tensor parallelism divides, whichever way it comes; norms are on every rank.
    divided = 2 * (64 * 2 * (64 + 32) + 3 * 64 * 128) + 2 * 512 * 64
    assert found["received"]["by plan"] == divided  # 2 bytes an element, of one half
    assert {len(seconds) for seconds in found["seconds"].values()} == {2}
    assert found["ranks"] == 2
