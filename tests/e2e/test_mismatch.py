"""`mismatch` as a user types it; the real engines on a tiny checkpoint behind `slow`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_precision.cli import main
from megatron_precision.mismatch.comparison import read_samples, read_scores
from tests.e2e import real_jobs

E2E = Path(__file__).parent
START = (sys.executable, str(E2E / "chat_start.py"))


def test_every_mistake_is_listed_before_anything_starts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    words += ["--train", "fp16,fp61", "--num-prompts", "0"]
    assert main.main(["mismatch", *words]) == 2
    shown = capsys.readouterr().err
    for text in ("fp61", "--num-prompts", str(tmp_path / "none")):
        assert text in shown
    assert not (tmp_path / "out").exists()


def mismatch(folder: Path, *words: str) -> str:
    line = [sys.executable, "-m", "megatron_precision", "mismatch", "--model", "model"]
    line += ["--prompts", "sums.jsonl", "--out", "out", "--num-prompts", "5", "--rollouts", "2"]
    line += ["--max-tokens", "24", "--train", "fp16,fp32", "--rollout", "fp32", *words]
    done = subprocess.run(
        line, cwd=folder, env=real_jobs.environment(E2E), capture_output=True, text=True,
        timeout=real_jobs.PATIENCE_S, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_checkpoint_is_sampled_scored_and_reported_and_goes_on_where_it_was(
    tmp_path: Path,
) -> None:
    subprocess.run([*START, str(tmp_path)], check=True, env=real_jobs.environment(E2E))
    shown = mismatch(tmp_path)
    assert "report: out/report.html" in shown
    report = json.loads((tmp_path / "out/report.json").read_text())
    found = {(c["train"], c["rollout"]): c["statistics"] for c in report["cells"]}
    assert list(found) == [("fp16", "fp32"), ("fp32", "fp32")]
    # Two implementations in FP32, and one of them with 11 bits instead of 24.
    assert 0 < found["fp32", "fp32"]["abs_diff_mean"] < 1e-5
    assert 1e-5 < found["fp16", "fp32"]["abs_diff_mean"] < 1e-2
    samples = read_samples(tmp_path / "out/sample-fp32.npz")
    logprobs = read_scores(tmp_path / "out/score-fp32-of-fp32.npz").train_logprobs
    assert len(samples.responses) == 10
    assert len(logprobs) == samples.lengths.sum() == found["fp32", "fp32"]["num_tokens"]
    np.testing.assert_allclose(
        logprobs, transformers_logprobs(tmp_path / "model", samples), atol=1e-4
    )
    page = (tmp_path / "out/report.html").read_text()
    assert "accumulated in FP32" in page  # the shim is named
    assert report["took_s"].keys() == {"sample-fp32", "score-fp16", "score-fp32"}
    assert all(seconds > 1 for seconds in report["took_s"].values())
    # Again: nothing is sampled, and a dtype more costs its own parts alone.
    before = (tmp_path / "out/sample-fp32.npz").stat().st_mtime_ns
    (tmp_path / "out/score-fp16-of-fp32.npz").unlink()
    mismatch(tmp_path)
    assert (tmp_path / "out/sample-fp32.npz").stat().st_mtime_ns == before
    again = json.loads((tmp_path / "out/report.json").read_text())
    assert [c["statistics"] for c in again["cells"]] == list(found.values())


@pytest.mark.slow
def test_of_an_moe_checkpoint_tokens_are_told_apart_by_their_routing(tmp_path: Path) -> None:
    environment = real_jobs.environment(E2E)
    subprocess.run([*START, str(tmp_path), "sanity.tiny_moe"], check=True, env=environment)
    words = ["--train", "bf16,fp32", "--rollout", "bf16", "--num-prompts", "12", "--rollouts", "8"]
    shown = mismatch(tmp_path, *words)
    assert "engine's experts replayed" in shown
    report = json.loads((tmp_path / "out/report.json").read_text())
    bf16, fp32 = report["cells"]
    samples = read_samples(tmp_path / "out/sample-bf16.npz")
    tokens = [len(p) + len(r) for p, r in zip(samples.prompts, samples.responses, strict=True)]
    assert samples.routed_experts is not None
    assert [len(part) for part in samples.routed_experts] == tokens
    for cell in (bf16, fp32):
        # Random experts of an untrained model: a flip costs a token much, and is taken back.
        assert 0 < cell["router"]["flip_share"] < 0.1
        assert cell["router"]["tokens"] == sum(tokens) - len(tokens)  # a last token passes nothing
        unflipped, *flipped = cell["by_router_flips"]
        assert (unflipped["low"], unflipped["high"]) == (-1, 0)
        assert sum(c["tokens"] for c in (unflipped, *flipped)) == samples.lengths.sum()
        assert max(c["k3"] for c in flipped) > 3 * unflipped["k3"]
        assert cell["replayed"]["k3_kl"] < 0.7 * cell["statistics"]["k3_kl"]
    assert "By router flips" in (tmp_path / "out/report.html").read_text()


def transformers_logprobs(folder: Path, samples: object) -> np.ndarray:  # type: ignore[type-arg]
    """The oracle: transformers in FP32, one sequence at a time."""
    import torch
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    values: list[float] = []
    for prompt, response in zip(samples.prompts, samples.responses, strict=True):  # type: ignore[attr-defined]
        ids = torch.tensor([[*prompt, *response]])
        with torch.no_grad():
            logprobs = model(ids).logits.log_softmax(-1)[0, len(prompt) - 1 : -1]
        values += logprobs.gather(1, torch.tensor(response)[:, None])[:, 0].tolist()
    return np.array(values)
