"""A real run dumps an iteration, and the dump is scored again: same bits, or not, by choice."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.e2e import real_jobs

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def dump(dense_start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("replay")
    words = real_jobs.settings(
        train__dump_every=1, train__prompts_per_iteration=8, train__micro_batch_size=5
    )
    finished = real_jobs.torchrun(
        folder, 2, "train", "sanity.tiny_dense", "--precision", "bf16", "--out", "run",
        "--start-from", str(dense_start), *words,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    # The second iteration's weights are no longer those of the start.
    return folder / "run" / "dumps" / "000001"


def replayed(dump: Path, *words: str) -> tuple[dict[str, Any], dict[str, Any], str]:
    """Figures and log-probs of a replay, and what it printed."""
    out = dump.parent / "-".join(("replay", *words)).replace("=", "")
    command = real_jobs.module_words("replay", str(dump), *words, "--out", str(out))
    finished = real_jobs.run([sys.executable, *command], dump.parent)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    figures = json.loads((out / "replay.json").read_text())
    assert (out / "replay.png").read_bytes().startswith(b"\x89PNG")
    return figures, load_file(out / "logprobs.safetensors"), finished.stdout


def test_at_the_runs_own_dtype_and_layout_every_bit_comes_back(dump: Path) -> None:
    figures, logprobs, printed = replayed(dump)
    rollouts = load_file(dump / "rollouts.safetensors")
    assert rollouts["old_known"].all()
    mask = rollouts["response_mask"]
    np.testing.assert_array_equal(logprobs["replay"][mask], rollouts["old_logprobs"][mask])
    # The engine's are other numbers, and so are FP32's.
    assert (logprobs["replay"][mask] != rollouts["rollout_logprobs"][mask]).mean() > 0.5
    assert (logprobs["fp32"][mask] != rollouts["old_logprobs"][mask]).mean() > 0.5
    assert "The replay's log-probs are the trainer's, bit for bit." in printed
    (event,) = real_jobs.events(dump.parents[1], "iteration")[1:]
    mismatch = figures["pairs"][0]
    assert (mismatch["a"], mismatch["b"]) == ("trainer", "rollout")
    assert mismatch["k3"] == pytest.approx(event["mismatch/k3_kl"], rel=1e-9)
    assert mismatch["tokens"] == event["mismatch/num_tokens"]
    # BF16 keeps 8 bits: layers lose some 2^-9 of their output each, and FP32 none of it.
    own = {point["name"]: point["mean"] for point in figures["forced"]}
    assert own["embedding"] == 0.0
    assert all(2**-11 < own[name] < 2**-6 for name in ("layer 0", "layer 1", "LM head"))


def test_in_fp32_and_another_layout_they_do_not(dump: Path) -> None:
    figures, logprobs, printed = replayed(dump, "--precision", "fp32", "--layout", "tp=1")
    rollouts = load_file(dump / "rollouts.safetensors")
    mask = rollouts["response_mask"]
    assert (logprobs["replay"][mask] != rollouts["old_logprobs"][mask]).mean() > 0.5
    np.testing.assert_allclose(logprobs["replay"][mask], rollouts["old_logprobs"][mask], atol=0.7)
    assert figures["forced"] == []
    assert "bit for bit" not in printed


def test_a_run_with_the_engine_s_experts_comes_back_bit_for_bit(
    dense_start: Path, tmp_path: Path
) -> None:
    maker = Path(__file__).with_name("moe_start.py")
    made = real_jobs.run([sys.executable, str(maker), str(dense_start), "start"], tmp_path)
    assert made.returncode == 0, made.stderr
    finished = real_jobs.torchrun(
        tmp_path, 2, "train", "sanity.tiny_moe", "--precision", "bf16", "--out", "run",
        "--start-from", "start", *real_jobs.settings(
            model__moe_intermediate_size=384, train__routing_replay="true", train__dump_every=1,
            algo__name="PPO",
        ),
    )  # fmt: skip
    assert finished.returncode == 0, finished.stdout + finished.stderr
    found = tmp_path / "run" / "dumps" / "000001"
    figures, _, printed = replayed(found)
    assert "The replay's log-probs are the trainer's, bit for bit." in printed
    (event,) = real_jobs.events(tmp_path / "run", "iteration")[1:]
    assert figures["engine_flips"] == pytest.approx(event["mismatch/router_flip_share_by_layer"])
    assert figures["by_router_flips"][0]["low"] == 0


def test_a_folder_that_is_no_dump_is_refused_at_once(dump: Path) -> None:
    words = real_jobs.module_words("replay", str(dump.parent))
    finished = real_jobs.run([sys.executable, *words], dump.parent)
    assert finished.returncode == 2
    assert "not a whole dump" in finished.stderr
