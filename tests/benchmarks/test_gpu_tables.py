"""The tables say what the raw results say, worked out by hand, and what is not there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.gpu import cases, tables
from benchmarks.gpu.measures import class_of
from megatron_precision.config.schema import to_dict
from megatron_precision.preflight import memory


def put(folder: Path, name: str, **facts: Any) -> None:
    facts = {"case": name, "platform": {"device": "NVIDIA H200"}, **facts}
    (folder / f"{name}.json").write_text(json.dumps(facts), encoding="utf-8")


def rows(text: str, title: str) -> list[list[str]]:
    part = text.split(f"## {title}\n\n")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in part.splitlines()]


def test_training_is_fp16_beside_bf16(tmp_path: Path) -> None:
    configs = {}
    for precision in ("fp16", "bf16"):
        name = f"train-qwen3-1.7b-4k-{precision}"
        case = next(case for case in cases.CASES if case.name == name)
        configs[precision] = cases.config(case, tiny=False, gpu=True)
    planned = memory.of_trainer(configs["fp16"])
    profile = {"seconds": 2.0, "busy_s": 1.5, "by_class": {"products": 1.2, "norm": 0.3}}
    put(
        tmp_path, "train-qwen3-1.7b-4k-fp16", tokens_per_s=19_400, mfu=0.451, skipped_steps=1,
        memory={"peak_allocated_bytes": 0.95 * planned}, config=to_dict(configs["fp16"]),
        profile=profile, step={"median_s": 2.0},
    )  # fmt: skip
    put(
        tmp_path, "train-qwen3-1.7b-4k-bf16", tokens_per_s=20_000, mfu=0.465, skipped_steps=0,
        memory={"peak_allocated_bytes": planned // 2}, config=to_dict(configs["bf16"]),
    )  # fmt: skip
    text = tables.text(tmp_path)
    assert "Measured on: NVIDIA H200." in text
    _, _, row = rows(text, "Training")
    assert row == [
        "qwen3-1.7b-4k", "16,384", "19,400 / 20,000", "0.970", "45.1% / 46.5%",
        "0.95 / 0.50", "1 / 0",
    ]  # fmt: skip
    head, _, shares = rows(text, "Share of a step's kernels (FP16)")
    assert head == ["measure", "busy, of a step", "products", "norm"]
    assert shares == ["qwen3-1.7b-4k", "75.0%", "80.0%", "20.0%"]


def test_an_engine_is_measured_against_a_copy(tmp_path: Path) -> None:
    def sync(push: float) -> dict[str, Any]:
        seconds = {"copy": 0.010, "push": push, "push_and_proof": 0.03, "plan_and_bind": 1.5}
        return {name: {"median_s": value} for name, value in seconds.items()}

    put(
        tmp_path, "engine-qwen3-1.7b-fp16", rollout={"tokens_per_s": 9_000},
        mismatch={"mismatch/k3_kl": 1e-6, "mismatch/abs_diff_mean": 2e-4}, sync=sync(0.012),
    )  # fmt: skip
    put(
        tmp_path, "engine-qwen3-1.7b-bf16", rollout={"tokens_per_s": 10_000},
        mismatch={"mismatch/k3_kl": 6.4e-5}, sync=sync(0.02), error="exit code 1 after 9 s",
    )  # fmt: skip
    put(tmp_path, "engine-qwen3-1.7b-fp32", mismatch={"mismatch/k3_kl": 1e-10})
    text = tables.text(tmp_path)
    row = rows(text, "Engine")[2]
    assert row[:6] == [
        "qwen3-1.7b", "9,000 / 10,000", "0.900", "1.20 / 2.00", "3.00 / 3.00", "1.50 / 1.50"
    ]  # fmt: skip
    assert row[6:] == ["- / -"] * 3  # it did not come to sleep
    both, alone = rows(text, "Mismatch at equal weights")[2:]
    assert both == ["qwen3-1.7b", "1.00e-06 / 6.40e-05", "64", "2.00e-04 / -", "- / -"]
    assert alone[:3] == ["qwen3-1.7b-fp32", "1.00e-10 / -", "-"]
    absent = text.split("## Not measured, or not to the end")[1]
    assert "`engine-qwen3-1.7b-bf16`: exit code 1 after 9 s" in absent
    assert "`engine-qwen3-1.7b-fp16`" not in absent
    assert "`sanity-smollm2`: not measured" in absent


def test_the_experiments_have_their_own_tables(tmp_path: Path) -> None:
    put(tmp_path, "tests", passed=40, failed=1, skipped=2, seconds=181.2)
    cells = [
        {"train": t, "rollout": r, "statistics": {"k3_kl": k3}}
        for t, r, k3 in [("bf16", "bf16", 2e-3), ("bf16", "fp16", 1e-3), ("fp16", "bf16", 1.2e-3),
                         ("fp16", "fp16", 3e-5)]
    ]  # fmt: skip
    put(tmp_path, "mismatch-smollm2", cells=cells)
    runs = [{"precision": "bf16"}, {"precision": "fp16"}]
    figures = {"k3": {"values": [2e-3, 1e-3], "ratio": 2.0}, "skips": {"values": [None, "nan"],
               "ratio": None}}  # fmt: skip
    put(tmp_path, "sanity-smollm2", runs=runs, figures=figures)
    text = tables.text(tmp_path)
    assert "40 passed, 1 failed, 2 skipped in 181 s" in text
    assert rows(text, "SmolLM2-135M: k3, nats a token")[2:] == [
        ["bf16", "2.00e-03", "1.00e-03"], ["fp16", "1.20e-03", "3.00e-05"]
    ]  # fmt: skip
    assert rows(text, "The sanity experiment on SmolLM2-135M")[2:] == [
        ["k3", "0.002", "0.001", "2"], ["skips", "-", "nan", "-"]
    ]  # fmt: skip


def test_an_empty_folder_has_no_tables(tmp_path: Path) -> None:
    text = tables.text(tmp_path)
    assert "nothing yet" in text
    assert "| measure" not in text


@pytest.mark.parametrize(
    ("kernel", "name"),
    [
        ("nvjet_hsh_256x128_64x4_2x1_v_bz_coopA_NTN", "products"),
        ("sm90_xmma_gemm_f16f16_f16f32_f32_tn_n_tilesize128x128x64", "products"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop_wgmma_f16", "attention"),
        ("void transformer_engine::normalization::rmsnorm_fwd_tuned_kernel", "norm"),
        ("void at::native::multi_tensor_apply_kernel<FusedAdamMathFunctor>", "optimizer"),
        ("Memcpy DtoD (Device -> Device)", "copies and casts"),
        ("void at::native::vectorized_elementwise_kernel<4, MulFunctor>", "elementwise"),
        (
            "unrolled_elementwise_kernel<BinaryFunctor, LoadWithCast<2>, StoreWithCast<1>>",
            "elementwise",
        ),
        ("at::native::elementwise_kernel_with_index<int, arange_cuda_out>", "elementwise"),
        ("at::native::index_elementwise_kernel<128, 4, gpu_index_kernel>", "routing, gathers"),
        ("transformer_engine::detail::cast_transpose_kernel", "copies and casts"),
        ("aten::mm", "products"),
        ("aten::_log_softmax", "log-probs"),
        ("aten::mul", "elementwise"),
    ],
)
def test_a_kernel_is_known_by_its_name(kernel: str, name: str) -> None:
    assert class_of(kernel) == name


def test_other_trainers_stand_beside_the_engines_own(tmp_path: Path) -> None:
    others = {"fp32": {"mismatch/k3_kl": 7e-6}, "bf16": {"mismatch/k3_kl": 5e-4}}
    own = {"mismatch/k3_kl": 9e-6}
    put(tmp_path, "engine-qwen3-1.7b-fp16", mismatch=own, other_trainers=others)
    head, _, row = rows(tables.text(tmp_path), "Other trainers, the same responses")
    assert head == ["k3 of trainer", "as the engine", "fp32", "bf16"]
    assert row == ["qwen3-1.7b-fp16", "9.00e-06", "7.00e-06", "5.00e-04"]
