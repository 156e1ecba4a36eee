"""What the converter says of damage: in plain words, once, with a remedy that helps."""

from __future__ import annotations

import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_precision.checkpoint import manifest
from tests.distributed.oracle import DENSE
from tests.tools.hf_folders import MODELS, save, tensors_of
from tools.checkpoint_convert import convert
from tools.checkpoint_convert.cli import main


def edit(config: Path, **fields: Any) -> None:
    config.write_text(json.dumps(json.loads(config.read_text()) | fields), encoding="utf-8")


def message(captured: pytest.CaptureFixture[str]) -> str:
    """What the converter said; transformers draws a bar before, as it saves."""
    said = captured.readouterr().err
    return said[said.index("error:") :]


@pytest.mark.timeout(60)
@pytest.mark.parametrize("side", ["hf", "megatron"])
@pytest.mark.parametrize(
    ("field", "got", "there"),
    [
        ("num_hidden_layers", 1_000_000_000, 2),
        ("num_hidden_layers", 1, 2),
        ("num_local_experts", 1_000_000_000, 4),
    ],
)
def test_numbers_of_layers_and_experts_are_held_against_the_tensors(
    side: str, field: str, got: int, there: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without enumerating what a configuration says, which would take for ever."""
    model = MODELS["qwen3_moe"]
    assert (model.num_hidden_layers, model.num_experts) == (2, 4)
    hf = save(model, tmp_path / "hf")
    convert.import_checkpoint(hf, tmp_path / "megatron")
    (tmp_path / "megatron" / manifest.FILE).unlink()
    config = {"hf": "config.json", "megatron": "huggingface/config.json"}[side]
    fields = json.loads((hf / "config.json").read_text())
    field = field if field in fields else "num_experts"
    edit(tmp_path / side / config, **{field: got})
    if field == "num_hidden_layers":
        edit(tmp_path / side / config, layer_types=None)
    assert main(["inspect", str(tmp_path / side)]) == 2
    error = message(capsys)
    assert error.startswith("error: the configuration and the tensors disagree\n"), error
    assert f"got:      {got}\n" in error
    assert f"expected: {there}, by the tensors" in error


def test_an_index_that_is_missing_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = save(DENSE, tmp_path / "hf")
    (hf / "model.safetensors.index.json").unlink()
    assert main(["inspect", str(hf)]) == 2
    error = message(capsys)
    assert error.startswith("error: the index of the shards is missing\n")
    assert f"no file, and {len(list(hf.glob('*.safetensors')))} shards" in error
    assert "copy it again" in error


def test_tensors_of_a_shard_that_is_missing_are_not_missed_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = save(DENSE, tmp_path / "hf")
    shard = sorted(hf.glob("*.safetensors"))[0]
    shard.unlink()
    assert main(["inspect", str(hf)]) == 2
    error = message(capsys)
    assert error.startswith("error: the index names a shard that is not there\n")
    assert shard.name in error
    assert "missing tensor" not in error


def test_a_tensor_that_is_in_no_shard_is_missing_whatever_the_index_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One that the index lists, one that it does not, and one that it lists and nobody has."""
    hf = save(DENSE, tmp_path / "hf")
    index = hf / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    lost, unlisted = "model.embed_tokens.weight", "model.norm.weight"
    assert listed[lost] != listed[unlisted]
    for name in (lost, unlisted):
        tensors = load_file(hf / listed[name])
        del tensors[name]
        save_file(tensors, hf / listed[name], {"format": "pt"})
    listed["model.stranger"] = listed.pop(unlisted)
    edit(index, weight_map=listed)
    assert main(["import", str(hf), str(tmp_path / "out")]) == 2
    error = message(capsys)
    assert error.startswith("error: 3 problems")
    for name in (lost, unlisted):
        assert f"a missing tensor\n    where:    {hf}: {name}\n" in error
    assert "the index is wrong" in error
    assert f"model.stranger in {listed['model.stranger']}" in error


def test_a_quantised_tensor_is_not_called_damaged(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = save(DENSE, tmp_path / "hf")
    file = sorted(hf.glob("*.safetensors"))[0]
    tensors = load_file(file)
    names = sorted(tensors)[:2]
    for name in names:
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
    save_file(tensors, file, {"format": "pt"})
    assert main(["import", str(hf), str(tmp_path / "out")]) == 2
    error = message(capsys)
    assert error.startswith("error: 2 problems")
    for name in names:
        assert f"a dtype that is not converted\n    where:    {file}: {name}\n" in error
    assert "got:      F8_E4M3\n    expected: F64, F32, F16, BF16" in error
    assert "copy it again" not in error


def test_a_long_list_of_tensors_is_cut(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hf = save(DENSE, tmp_path / "hf")
    total = len(tensors_of(hf))
    edit(hf / "config.json", hidden_size=32)
    assert main(["inspect", str(hf)]) == 2
    error = message(capsys)
    # All but the norms of queries and keys, two a layer.
    assert error.startswith(f"error: {total - 4} problems")
    assert error.count("a tensor of another shape\n    where:") == 10
    assert error.endswith(f"... and {total - 14} more: a tensor of another shape\n")


def test_a_file_that_is_missing_is_to_be_copied_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    megatron = tmp_path / "megatron"
    convert.import_checkpoint(save(DENSE, tmp_path / "hf"), megatron)
    (megatron / "__0_0.distcp").unlink()
    (megatron / "huggingface" / "tokenizer.json").unlink()
    assert main(["inspect", str(megatron)]) == 2
    error = message(capsys)
    assert error.startswith("error: 2 problems")
    assert error.count("a file is missing") == 2
    assert error.count("remedy:   copy it again from where it was written") == 2
    assert manifest.FILE not in error


def garbage_metadata(folder: Path) -> str:
    (folder / ".metadata").write_bytes(b"garbage")
    return "7 bytes that cannot be read as it"


def other_metadata(folder: Path) -> str:
    (folder / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    return "other data"


def garbage_tensor(folder: Path) -> str:
    file = folder / "__0_0.distcp"
    file.write_bytes(bytes(file.stat().st_size))
    return "bytes that are no stored tensor"


def no_configuration(folder: Path) -> str:
    shutil.rmtree(folder / "huggingface")
    return "--config HF_DIR names a folder that has it"


def empty_shard(folder: Path) -> str:
    sorted(folder.glob("*.safetensors"))[0].write_bytes(b"")
    return "a file of 0 bytes, which ends before its header"


def header(text: bytes) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        file = sorted(folder.glob("*.safetensors"))[0]
        file.write_bytes(len(text).to_bytes(8, "little") + text)
        return "a header that is no JSON object" if b"dtype" not in text else "shape and data_off"

    return damage


def garbage_config(folder: Path) -> str:
    (folder / "config.json").write_text('{\n"a": }', encoding="utf-8")
    return "no JSON from line 2, column 6 on"


def binary_config(folder: Path) -> str:
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    return "bytes that are no text in UTF-8"


def deep_config(folder: Path) -> str:
    (folder / "config.json").write_text("[" * 100_000, encoding="utf-8")
    return "lists too deep"


def manifest_of(text: str, told: str) -> Callable[[Path], str]:
    def damage(folder: Path) -> str:
        (folder / manifest.FILE).write_text(text, encoding="utf-8")
        return told

    return damage


@pytest.mark.parametrize(
    ("side", "damage"),
    [
        ("megatron", garbage_metadata),
        ("megatron", other_metadata),
        ("megatron", garbage_tensor),
        ("megatron", no_configuration),
        ("megatron", manifest_of("[]", "a list, not an object")),
        ("megatron", manifest_of("{}", "no version")),
        ("megatron", manifest_of('{"version": 1, "tensors": []}', "no list of tensors")),
        ("hf", empty_shard),
        ("hf", header(b"{nothing")),
        ("hf", header(b"[1, 2]")),
        ("hf", header(b'{"a": {"dtype": "F16"}}')),
        ("hf", header(b'{"a": {"dtype": "F16", "shape": [-1], "data_offsets": [0, 0]}}')),
        ("hf", garbage_config),
        ("hf", binary_config),
        ("hf", deep_config),
    ],
)
def test_damage_is_told_in_plain_words(
    side: str, damage: Callable[[Path], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = save(DENSE, tmp_path / "hf")
    convert.import_checkpoint(hf, tmp_path / "megatron")
    (tmp_path / "megatron" / manifest.FILE).unlink()
    told = damage(tmp_path / side)
    command = "export" if side == "megatron" else "import"
    assert main([command, str(tmp_path / side), str(tmp_path / "out")]) == 2
    error = message(capsys)
    assert told in error
    assert "remedy:" in error or side == "hf"
    for python in ("Error", "Errno", "Traceback", "unpack", "invalid load key", "Expecting"):
        assert python not in error
    assert not (tmp_path / "out").exists()


def test_what_a_worker_refuses_is_said_as_it_said_it(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hf, megatron = save(DENSE, tmp_path / "hf"), tmp_path / "megatron"
    convert.import_checkpoint(hf, megatron)
    file = megatron / "__0_0.distcp"
    name = "model.layers.1.mlp.down_proj.weight"
    data = bytearray(file.read_bytes())
    data[data.index(tensors_of(hf)[name].view(torch.uint8).numpy().tobytes())] ^= 1
    file.write_bytes(data)
    assert main(["export", str(megatron), str(tmp_path / "out"), "--workers", "2"]) == 2
    error = message(capfd)
    assert error.startswith("error: a tensor's bytes are not those that were written\n")
    assert f"where:    {megatron}: {name}\n" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


def test_what_the_configuration_leaves_out_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = save(MODELS["qwen2"], tmp_path / "hf")
    assert main(["inspect", str(hf)]) == 0
    assert "config.json has no" not in capsys.readouterr().out
    values = json.loads((hf / "config.json").read_text())
    for name in ("rms_norm_eps", "rope_parameters"):
        del values[name]
    (hf / "config.json").write_text(json.dumps(values), encoding="utf-8")
    for words in (["inspect", str(hf)], ["import", str(hf), str(tmp_path / "out")]):
        assert main(words) == 0
        told = [line for line in capsys.readouterr().out.splitlines() if " has no " in line]
        assert told == [
            "config.json has no rms_norm_eps: 1e-06, as transformers takes it",
            "config.json has no rope_theta: 10000.0, as transformers takes it",
        ]
