"""The report says what the metrics hold: figures by hand, differences, failures, nothing fetched.

The runs are synthetic (conftest.py). Not covered: how the page looks; look at it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_precision.config.errors import UserError
from megatron_precision.observe.metrics import MetricsWriter
from megatron_precision.report.figures import final_figures
from megatron_precision.report.findings import findings, paired_difference, students_t
from megatron_precision.report.page import final_table, write_report
from megatron_precision.report.runs import load_runs, parameter_count, unexpected_differences

PLOT_NAMES = {
    "reward", "evaluation", "mismatch", "sequence_log_ratios", "loss_scale", "gradient_norm",
    "activations", "subnormal_gradients", "response_length", "time_by_phase",
}  # fmt: skip
SyntheticRun = Callable[..., Path]


def write_run(
    run_dir: Path, precision: str, iterations: list[dict[str, Any]],
    steps: list[dict[str, Any]] | None = None,
) -> Path:  # fmt: skip
    """A run with exactly these metrics."""
    with MetricsWriter(run_dir / "metrics.jsonl") as writer:
        writer.write("run", iteration=0, step=0, values={"config": {"precision": precision}})
        for number, values in enumerate(steps or []):
            writer.write("step", iteration=0, step=number + 1, values=values)
        for number, values in enumerate(iterations):
            writer.write("iteration", iteration=number, step=0, values=values)
        writer.write("end", iteration=0, step=0, values={"status": "completed", "error": ""})
    return run_dir


def report(run_dirs: list[Path], out: Path) -> tuple[str, dict[str, Any]]:
    """The page's text and the JSON beside it."""
    assert write_report(run_dirs, out) == out
    return out.read_text(), json.loads(out.with_suffix(".json").read_text())


def found_in(run_dirs: list[Path]) -> str:
    """The findings of some runs as one text."""
    return " ".join(findings(final_figures(load_runs(run_dirs))))


def test_the_page_has_every_section_and_every_figure(
    tmp_path: Path, synthetic_run: SyntheticRun
) -> None:
    runs = [synthetic_run(tmp_path / name, name) for name in ("bf16", "fp16")]
    page, _ = report(runs, tmp_path / "out" / "report.html")
    for name in ("findings", "what-was-run", "figures", "table", *PLOT_NAMES):
        assert f'id="{name}"' in page
    pictures = (tmp_path / "out" / "report_files").iterdir()
    assert {picture.name for picture in pictures} == {f"{name}.png" for name in PLOT_NAMES}
    for text in ("sanity.synthetic", "402,176 parameters", "PG-Seq-IS", "trainer TP 2", "42",
                 "ba9876543210", "precision: bf16 / fp16", "synthetic note",
                 "megatron-core 0.0-synthetic", "token-weighted mean"):  # fmt: skip
        assert text in page
    assert 'class="warning"' not in page


def test_the_page_fetches_nothing(tmp_path: Path, synthetic_run: SyntheticRun) -> None:
    page, _ = report([synthetic_run(tmp_path / "fp16", "fp16")], tmp_path / "report.html")
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == len(PLOT_NAMES)
    assert all(source.startswith("data:image/png;base64,iVBOR") for source in sources)
    assert not re.search(r"https?://|url\(|@import|<script|<link|<iframe", page)


def test_figures_and_ratios_are_those_worked_by_hand(tmp_path: Path) -> None:
    bf16 = write_run(tmp_path / "a", "bf16", [
        {"mismatch/k3_kl": 2e-4, "mismatch/abs_diff_max": 0.5, "mismatch/num_tokens": 100,
         "throughput/tokens_per_s": 100.0, "time/iteration_s": 3.0, "reward/mean": 0.0},
        {"mismatch/k3_kl": 6e-4, "mismatch/abs_diff_max": 0.2, "mismatch/num_tokens": 300,
         "throughput/tokens_per_s": 200.0, "time/iteration_s": 1.0, "reward/mean": 0.9},
    ], [{"precision/skipped": 1, "time/step_s": s} for s in (1.0, 4.0)])  # fmt: skip
    fp16 = write_run(tmp_path / "b", "fp16", [
        {"mismatch/k3_kl": 1e-5, "mismatch/abs_diff_max": 0.05, "mismatch/num_tokens": 50,
         "throughput/tokens_per_s": 50.0, "time/iteration_s": 2.0, "reward/mean": 0.6},
        {"reward/mean": 0.3},
    ], [{"precision/skipped": 0, "time/step_s": 5.0}])  # fmt: skip
    _, found = report([fp16, bf16], tmp_path / "report.html")  # the order must not matter
    assert found["ratio_of"] == ["BF16", "FP16"]
    expected = {  # key: (FP16, BF16, BF16 / FP16)
        "k3": (1e-5, 5e-4, 50.0),  # (100 * 2e-4 + 300 * 6e-4) / 400
        "abs_diff_max": (0.05, 0.5, 10.0),
        "tokens_per_s": (50.0, 125.0, 2.5),  # 500 tokens in 4 s
        "final_reward": (0.3, 0.9, 3.0),
        "step_s": (5.0, 2.5, 0.5),
    }
    for key, (of_fp16, of_bf16, ratio) in expected.items():
        figure = found["figures"][key]
        assert figure["values"] == pytest.approx([of_fp16, of_bf16])
        assert figure["ratio"] == pytest.approx(ratio)
    assert found["figures"]["skipped_steps"]["values"] == [0, 2]
    assert found["figures"]["skipped_steps"]["ratio"] is None  # nothing is a multiple of zero
    assert found["figures"]["ess"]["values"] == [None, None]
    table = final_table([fp16, bf16])
    assert re.search(r"Mismatch k3 KL \(nats/token\) +1.00e-05 +5.00e-04 +50×\n", table)
    assert "Effective sample size" not in table
    assert "\x1b" not in table


def test_non_finite_figures_are_kept_and_the_json_stays_strict(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", "fp16", [
        {"mismatch/k3_kl": float("inf"), "mismatch/num_tokens": 5, "mismatch/abs_diff_max": 1.0,
         "mismatch/seq_log_ratios": [float("inf"), 0.0]},
        {"mismatch/k3_kl": 1.0, "mismatch/num_tokens": 5, "mismatch/abs_diff_max": float("nan")},
    ])  # fmt: skip
    write_report([run], tmp_path / "report.html")
    found = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert found["figures"]["k3"]["values"] == ["inf"]
    assert found["figures"]["abs_diff_max"]["values"] == ["nan"]


def test_a_difference_besides_precision_is_warned_of(
    tmp_path: Path, synthetic_run: SyntheticRun
) -> None:
    bf16 = synthetic_run(tmp_path / "bf16", "bf16")
    fp16 = synthetic_run(tmp_path / "fp16", "fp16", config_changes={"seed": 7})
    page, found = report([bf16, fp16], tmp_path / "report.html")
    (warning,) = re.findall(r'<div class="warning"[^>]*>(.*?)</div>', page, re.DOTALL)
    assert "differ in more than precision" in warning
    assert "seed" in warning
    assert found["differences"] == {"precision": ["bf16", "fp16"], "seed": ["42", "7"]}


def test_dtypes_that_were_read_back_differ_as_precision_does(tmp_path: Path) -> None:
    def run(name: str, precision: str, params: str) -> Path:
        with MetricsWriter(tmp_path / name / "metrics.jsonl") as writer:
            writer.write("run", iteration=0, step=0, values={
                "config": {"precision": precision}, "dtypes": {"params": params},
            })  # fmt: skip
            writer.write("iteration", iteration=0, step=0, values={"reward/mean": 0.5})
        return tmp_path / name

    runs = load_runs([run("a", "bf16", "bf16"), run("b", "fp16", "fp16"), run("c", "fp16", "fp32")])
    assert unexpected_differences(runs[:2]) == {}
    assert unexpected_differences(runs[1:]) == {"dtypes.params": ["fp16", "fp32"]}


def test_rewards_that_differ_by_noise_coincide_and_others_do_not(
    tmp_path: Path, synthetic_run: SyntheticRun
) -> None:
    # Both synthetic runs draw the same noise, so these differ by a constant, or by nothing.
    bf16 = synthetic_run(tmp_path / "bf16", "bf16")
    same = synthetic_run(tmp_path / "same", "fp16")
    worse = synthetic_run(tmp_path / "worse", "fp16", reward_bonus=-0.2)
    assert "Training rewards coincide within noise" in found_in([bf16, same])
    assert "Training reward is higher in BF16" in found_in([bf16, worse])


def test_a_paired_difference_is_that_of_the_last_quarter(tmp_path: Path) -> None:
    gaps = [9.0] * 12 + [1.0, 2.0, 3.0, 6.0]  # mean 3, variance 14 / 3, standard error 1.0801
    first = write_run(tmp_path / "a", "bf16", [{"reward/mean": gap + 0.5} for gap in gaps])
    second = write_run(tmp_path / "b", "fp16", [{"reward/mean": 0.5} for _ in gaps])
    shorter = write_run(tmp_path / "c", "fp16", [{"reward/mean": 0.5} for _ in gaps[:15]])
    runs = load_runs([first, second, shorter])
    gap = paired_difference(runs[0], runs[1], "reward/mean")
    assert gap is not None
    assert (gap.mean, gap.num_points) == (3.0, 4)
    assert gap.standard_error == pytest.approx(1.080123, abs=1e-6)
    assert gap.within_noise  # 3 is less than 3.182 * 1.080
    assert paired_difference(runs[0], runs[2], "reward/mean") is None  # three points


@pytest.mark.parametrize(("degrees", "quantile"), [(3, 3.182), (9, 2.262), (30, 2.042)])
def test_students_quantile_is_that_of_the_printed_tables(degrees: int, quantile: float) -> None:
    assert students_t(degrees) == pytest.approx(quantile, rel=0.01)


def test_findings_give_the_ratio_of_the_mismatch_and_the_causes_of_skips(
    tmp_path: Path, synthetic_run: SyntheticRun
) -> None:
    bf16 = synthetic_run(tmp_path / "bf16", "bf16")
    fp16 = synthetic_run(tmp_path / "fp16", "fp16", skipped_steps=(30, 90))
    text = found_in([bf16, fp16])
    ratio = final_figures(load_runs([bf16, fp16])).ratios["k3"]
    assert f"its mean k3 mismatch is {ratio:.1f}× that of FP16" in text
    assert "FP16 skipped 2 of 160 optimizer steps (2 by gradients)" in text
    assert "loss scale moved between 2^14 and 2^16" in text


def test_one_run_is_enough(tmp_path: Path, synthetic_run: SyntheticRun) -> None:
    page, found = report([synthetic_run(tmp_path / "r", "fp16")], tmp_path / "report.html")
    assert "<h1>FP16</h1>" in page
    assert found["ratio_of"] is None
    assert "BF16 /" not in page
    assert "BF16" not in final_table([tmp_path / "r"])


def test_runs_of_one_policy_and_mixed_policies_have_their_own_names_and_colours(
    tmp_path: Path, synthetic_run: SyntheticRun
) -> None:
    dirs = [synthetic_run(tmp_path / "a", "fp16", iterations=5),
            synthetic_run(tmp_path / "b", "fp16", iterations=5),
            synthetic_run(tmp_path / "c", "bf16/fp16", iterations=5)]  # fmt: skip
    runs = load_runs(dirs)
    assert [run.label for run in runs] == ["FP16 (a)", "FP16 (b)", "BF16 train, FP16 rollout"]
    assert len({run.colour for run in runs}) == 3
    assert final_figures(runs).pair is None


def test_a_report_without_evaluations_says_so(tmp_path: Path, synthetic_run: SyntheticRun) -> None:
    bf16 = synthetic_run(tmp_path / "bf16", "bf16", iterations=3, with_evals=False)
    fp16 = synthetic_run(tmp_path / "fp16", "fp16", iterations=3, with_evals=False)
    page, found = report([bf16, fp16], tmp_path / "report.html")
    assert "No evaluation in BF16 and FP16" in page
    assert "No run has what this figure shows." in page
    assert not (tmp_path / "report_files" / "evaluation.png").exists()
    assert found["figures"]["final_eval_accuracy"]["values"] == [None, None]


def test_failed_killed_and_empty_runs_are_named(
    tmp_path: Path, synthetic_run: SyntheticRun
) -> None:
    failed = synthetic_run(
        tmp_path / "a", "bf16", iterations=6, status="failed", error="RuntimeError: <loss> is nan"
    )
    killed = synthetic_run(tmp_path / "b", "fp16", iterations=9, status=None)
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"event": "ste')
    (tmp_path / "c").mkdir()
    page, found = report([failed, killed, tmp_path / "c"], tmp_path / "report.html")
    assert "it failed after 6 of 40 iterations: RuntimeError: &lt;loss&gt; is nan" in page
    assert "killed, or is still running, after 9 of 40 iterations" in page
    assert "the last line of its metrics.jsonl is cut" in page
    assert "it has no metrics.jsonl" in page
    assert [run["status"] for run in found["runs"]] == ["failed", "unfinished", "unfinished"]
    assert "Too few shared iterations" in page


def test_a_picture_of_an_earlier_report_does_not_stay_behind(
    tmp_path: Path, synthetic_run: SyntheticRun
) -> None:
    with_evals = synthetic_run(tmp_path / "a", "fp16", iterations=5)
    without = synthetic_run(tmp_path / "b", "fp16", iterations=5, with_evals=False)
    write_report([with_evals], tmp_path / "report.html")
    assert (tmp_path / "report_files" / "evaluation.png").exists()
    write_report([without], tmp_path / "report.html")
    assert not (tmp_path / "report_files" / "evaluation.png").exists()


def test_wrong_folders_are_a_users_error_that_names_them_all(tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        write_report([tmp_path / "x", tmp_path / "y"], tmp_path / "report.html")
    assert str(tmp_path / "x") in str(error.value)
    assert str(tmp_path / "y") in str(error.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="nothing to report"):
        write_report([tmp_path / "empty"], tmp_path / "report.html")


def test_parameters_are_counted_as_transformers_counts_them() -> None:
    from transformers import Qwen3Config, Qwen3ForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": 13, "hidden_size": 12, "intermediate_size": 20, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
        "tie_word_embeddings": False,
    }  # fmt: skip
    experts = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 7}
    dense = Qwen3ForCausalLM(Qwen3Config(**sizes))
    moe = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes, **experts))
    assert parameter_count(sizes | {"num_experts": 0}) == dense.num_parameters()
    assert parameter_count(sizes | experts) == moe.num_parameters()


def test_a_report_needs_neither_torch_nor_an_engine(
    tmp_path: Path, synthetic_run: SyntheticRun
) -> None:
    run = synthetic_run(tmp_path / "r", "fp16", iterations=2)
    code = (
        "import sys; from pathlib import Path\n"
        "for name in ('torch', 'megatron', 'vllm', 'wandb', 'transformers'):\n"
        "    sys.modules[name] = None\n"
        "from megatron_precision.report.page import write_report\n"
        "write_report([Path(sys.argv[1])], Path(sys.argv[2]))\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    out = tmp_path / "report.html"
    done = subprocess.run(
        [sys.executable, "-c", code, str(run), str(out)],
        env=environment, check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert out.exists()
