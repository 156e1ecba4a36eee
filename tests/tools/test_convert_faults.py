"""Bad input, damage and kills: refused with the place named, and nothing half-written left."""

from __future__ import annotations

import json
import os
import pickle
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, MetadataIndex

from megatron_precision.checkpoint import manifest
from megatron_precision.config.errors import UserError
from tests.distributed.oracle import DENSE
from tests.tools.hf_folders import MODELS, save, tensors_of
from tools.checkpoint_convert import blocks, convert, source, torch_dist_folder
from tools.checkpoint_convert.cli import main


def test_nothing_is_removed_but_what_a_conversion_made(tmp_path: Path) -> None:
    hf, own = save(DENSE, tmp_path / "hf"), tmp_path / "out.partial"
    own.mkdir()
    (own / "thesis.txt").write_text("years of work", encoding="utf-8")
    with pytest.raises(UserError, match="somebody else"):
        convert.import_checkpoint(hf, tmp_path / "out")
    assert (own / "thesis.txt").exists()
    hf.rename(tmp_path / "src.partial")
    (tmp_path / "link").symlink_to(tmp_path / "src.partial")
    with pytest.raises(UserError, match="unfinished"):
        convert.import_checkpoint(tmp_path / "link", tmp_path / "src")
    assert (tmp_path / "src.partial" / "config.json").exists()


def test_a_tied_model_with_a_head_of_its_own_is_refused(tmp_path: Path) -> None:
    hf = save(MODELS["llama"], tmp_path / "hf")
    file = next(f for f in hf.glob("*.safetensors") if "model.embed_tokens.weight" in load_file(f))
    tensors = load_file(file)
    head = tensors["model.embed_tokens.weight"].clone()
    for change, refused in ((0.0, False), (7.0, True)):
        save_file(tensors | {"lm_head.weight": head + change}, file)
        if refused:
            with pytest.raises(UserError, match="head of its own"):
                source.open_source(hf)
        else:
            assert "lm_head.weight" not in source.open_source(hf).tensors


def test_a_manifest_without_a_tensor_is_not_believed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, megatron = save(DENSE, tmp_path / "hf"), tmp_path / "megatron"
    convert.import_checkpoint(hf, megatron)
    values = json.loads((megatron / manifest.FILE).read_text())
    (megatron / manifest.FILE).write_text(json.dumps(values | {"tensors": {}}))
    assert main(["export", str(megatron), str(tmp_path / "back")]) == 2
    assert "no hash" in capsys.readouterr().err


def test_a_layout_that_does_not_divide_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = save(DENSE, tmp_path / "hf")
    words = ["import", str(hf), str(tmp_path / "out"), "--tp", "3", "--pp", "5", "--ep", "2"]
    assert main(words) == 2
    assert "4 problems" in capsys.readouterr().err


def test_a_killed_conversion_leaves_nothing_that_looks_whole(tmp_path: Path) -> None:
    hf = save(DENSE, tmp_path / "hf")
    began = time.monotonic()
    convert.import_checkpoint(hf, tmp_path / "timed")
    convert.export_checkpoint(tmp_path / "timed", tmp_path / "timed_back")
    whole_s = time.monotonic() - began
    chance, killed = random.Random(0), 0
    for number in range(25):
        megatron, back = tmp_path / f"m{number}", tmp_path / f"b{number}"
        child = os.fork()
        if child == 0:
            convert.import_checkpoint(hf, megatron)
            convert.export_checkpoint(megatron, back)
            os._exit(0)
        time.sleep(chance.random() * whole_s)
        os.kill(child, signal.SIGKILL)
        killed += os.waitpid(child, 0)[1] == signal.SIGKILL
        for folder in (megatron, back):
            if folder.exists():
                assert main(["verify", str(hf), str(folder)]) == 0
            partial = folder.with_name(folder.name + ".partial")
            # Its tensors are whole once the configuration stands beside them.
            if partial.exists() and not (partial / "config.json").exists():
                with pytest.raises((OSError, ValueError)):
                    transformers.AutoModelForCausalLM.from_pretrained(partial)
                assert main(["verify", str(hf), str(partial)]) != 0
        shutil.rmtree(back, ignore_errors=True)
        if not megatron.exists():
            convert.import_checkpoint(hf, megatron)
        convert.export_checkpoint(megatron, back)
        assert main(["verify", str(hf), str(back)]) == 0
    assert killed > 10


def break_missing(hf: Path) -> str:
    file = sorted(hf.glob("*.safetensors"))[0]
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors["model.stranger"] = tensors.pop(name)
    save_file(tensors, file)
    return "model.stranger"


def break_shard(hf: Path) -> str:
    file = sorted(hf.glob("*.safetensors"))[1]
    file.unlink()
    return file.name


def break_size(hf: Path) -> str:
    file = sorted(hf.glob("*.safetensors"))[0]
    file.write_bytes(file.read_bytes()[:-3])
    return "cut short"


def break_config(hf: Path) -> str:
    values = json.loads((hf / "config.json").read_text())
    values |= {"sliding_window": 128, "use_sliding_window": True, "n_shared_experts": 2}
    (hf / "config.json").write_text(json.dumps(values))
    return "n_shared_experts"


def break_shape(hf: Path) -> str:
    values = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(values | {"intermediate_size": 41}))
    return "down_proj"


def break_twice(hf: Path) -> str:
    shutil.copyfile(sorted(hf.glob("*.safetensors"))[0], hf / "model.safetensors")
    return "weights twice"


def break_offsets(hf: Path) -> str:
    """Two tensors of one size over the same bytes."""
    file = sorted(hf.glob("*.safetensors"))[0]
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header.pop("__metadata__", None)
    sizes: dict[int, list[str]] = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        sizes.setdefault(end - begin, []).append(name)
    one, other = next(names for names in sizes.values() if len(names) > 1)[:2]
    header[other]["data_offsets"] = header[one]["data_offsets"]
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    return "are taken"


def break_config_kind(hf: Path) -> str:
    (hf / "config.json").write_text("[1, 2]")
    return "not an object"


def break_rope(hf: Path) -> str:
    values = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(values | {"rope_parameters": [1]}))
    return "rope_parameters"


def break_index(hf: Path) -> str:
    (hf / "model.safetensors.index.json").write_text('{"weight_map": {"a": 3}}')
    return "cannot read the index"


def break_config_values(hf: Path) -> str:
    values = json.loads((hf / "config.json").read_text())
    values |= {"num_attention_heads": 0, "rms_norm_eps": None}
    (hf / "config.json").write_text(json.dumps(values))
    return "rms_norm_eps"


def break_architecture(hf: Path) -> str:
    values = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(values | {"model_type": "qwen4"}))
    return "qwen3"


@pytest.mark.parametrize(
    "damage",
    [
        break_missing, break_shard, break_size, break_config, break_shape, break_twice,
        break_offsets, break_config_kind, break_config_values, break_architecture,
        break_rope, break_index,
    ],
)  # fmt: skip
def test_a_source_that_is_not_whole_is_refused_and_nothing_is_left(
    damage, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = save(DENSE, tmp_path / "hf")
    hint = damage(hf)
    assert main(["import", str(hf), str(tmp_path / "out")]) == 2
    assert hint in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


def test_an_output_that_exists_and_a_full_disk_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = save(DENSE, tmp_path / "hf")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="not a new folder"):
        convert.import_checkpoint(hf, tmp_path / "out")
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: usage._replace(free=1000))
    with pytest.raises(UserError, match="no room on the disk"):
        convert.import_checkpoint(hf, tmp_path / "other")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "out"]


@pytest.mark.parametrize("command", ["import", "export"])
def test_a_disk_that_fills_in_the_middle_leaves_nothing(command: str, tmp_path: Path) -> None:
    """The room was there when it was looked at. A limit of the process ends the write for us."""
    hf, megatron, out = save(DENSE, tmp_path / "hf"), tmp_path / "megatron", tmp_path / "out"
    convert.import_checkpoint(hf, megatron)
    source_folder = hf if command == "import" else megatron
    said = tmp_path / "said"
    child = os.fork()
    if child == 0:
        code = 99
        try:
            with open(said, "w", encoding="ascii") as sys.stderr:
                resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
                code = main([command, str(source_folder), str(out)])
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    error = said.read_text()
    assert error.startswith("error: no room for the output\n")
    assert f"where:    {out}\n" in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron", "said"]


@pytest.mark.parametrize("side", ["megatron", "back"])
def test_a_flipped_bit_is_found_and_its_tensor_named(
    side: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = save(DENSE, tmp_path / "hf")
    convert.import_checkpoint(hf, tmp_path / "megatron")
    convert.export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    files = [*tmp_path.glob(f"{side}/*.distcp"), *tmp_path.glob(f"{side}/*.safetensors")]
    file = max(files, key=lambda path: path.stat().st_size)
    wanted = tensors_of(hf)["model.layers.0.mlp.down_proj.weight"]
    needle = wanted.view(torch.uint8).numpy().tobytes()
    data = bytearray(file.read_bytes())
    data[data.index(needle) + 7] ^= 4
    file.write_bytes(data)
    assert main(["verify", str(hf), str(tmp_path / side)]) == 2
    shown = capsys.readouterr()
    assert "model.layers.0.mlp.down_proj.weight" in shown.err
    assert "not those that were written" in shown.err
    # The other tensors were compared all the same, and are right.
    assert "0 differences, 1 damaged" in shown.out


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    hf = save(DENSE, tmp_path / "hf")
    convert.import_checkpoint(hf, tmp_path / "megatron")

    class Trap:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (open, (str(tmp_path / "sprung"), "w"))

    metadata = tmp_path / "megatron" / torch_dist_folder.METADATA
    metadata.write_bytes(pickle.dumps(Trap()))
    (tmp_path / "megatron" / manifest.FILE).unlink()
    with pytest.raises(UserError, match="has no place in checkpoint metadata"):
        source.open_source(tmp_path / "megatron")
    assert not (tmp_path / "sprung").exists()


def test_metadata_of_any_python_is_read(tmp_path: Path) -> None:
    hf = save(DENSE, tmp_path / "hf")
    convert.import_checkpoint(hf, tmp_path / "megatron")
    metadata = tmp_path / "megatron" / torch_dist_folder.METADATA
    values = pickle.loads(metadata.read_bytes())

    class ByName(pickle.Pickler):  # Enum.__reduce_ex__ of Python 3.11.2
        def reducer_override(self, value: Any) -> Any:
            return (
                (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented
            )

    class ByValue(pickle.Pickler):  # and of 3.12
        def reducer_override(self, value: Any) -> Any:
            return (type(value), (value.value,)) if isinstance(value, Enum) else NotImplemented

    (tmp_path / "megatron" / manifest.FILE).unlink()
    seen = []
    for pickler in (ByName, ByValue):
        with metadata.open("wb") as file:
            pickler(file).dump(values)
        seen.append(b"getattr" in metadata.read_bytes())
        assert main(["verify", str(hf), str(tmp_path / "megatron")]) == 0
    assert seen == [True, False]


@pytest.mark.parametrize("name", ["__init__", "__subclasses__", "mro"])
def test_of_an_enumeration_a_pickle_gets_its_members_alone(tmp_path: Path, name: str) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (getattr, (_MEM_FORMAT_ENCODING, name))

    (tmp_path / torch_dist_folder.METADATA).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="cannot be read as it"):
        torch_dist_folder._read_metadata(tmp_path)


def test_a_pickle_gets_no_attribute_of_anything_else(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> Any:
            return (getattr, (torch.Size, "numel"))

    (tmp_path / torch_dist_folder.METADATA).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match="has no place in checkpoint metadata"):
        torch_dist_folder._read_metadata(tmp_path)


def edit_metadata(folder: Path, edit: Callable[[Any], None]) -> None:
    """Change what `.metadata` says, and take the manifest away: it would tell."""
    path = folder / torch_dist_folder.METADATA
    values = pickle.loads(path.read_bytes())
    edit(values)
    path.write_bytes(pickle.dumps(values))
    (folder / manifest.FILE).unlink()


def chunk_twice(values: Any) -> None:
    """The first rows of the embedding stand for the next ones as well."""
    _, stored = embedding(values)
    first, second, _rest = stored.chunks
    second.offsets = first.offsets


def no_place(values: Any) -> None:
    name, stored = embedding(values)
    del values.storage_data[MetadataIndex(name, stored.chunks[1].offsets)]


def other_dtype(values: Any) -> None:
    embedding(values)[1].properties.dtype = torch.float16


def other_vocabulary(values: Any) -> None:
    stored = embedding(values)[1]
    stored.size = torch.Size((stored.size[0] + 4, stored.size[1]))


def embedding(values: Any) -> tuple[str, Any]:
    name = "embedding.word_embeddings.weight"
    return name, values.state_dict_metadata[name]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (chunk_twice, "a tensor is not covered"),
        (no_place, "a part without a place"),
        (other_dtype, "a damaged tensor"),
        (other_vocabulary, "a tensor of another shape"),
    ],
)
def test_metadata_that_does_not_fit_is_refused(
    edit: Callable[[Any], None],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    hf, megatron = save(DENSE, tmp_path / "hf"), tmp_path / "megatron"
    rows = DENSE.vocab_size // 2
    monkeypatch.setattr(blocks, "BLOCK_BYTES", rows * DENSE.hidden_size * 2)
    convert.import_checkpoint(hf, megatron)
    edit_metadata(megatron, edit)
    assert main(["export", str(megatron), str(tmp_path / "back")]) == 2
    assert message in capsys.readouterr().err


def test_megatrons_padding_of_the_vocabulary_is_told_from_another_models() -> None:
    # Qwen3's 151,936 rows at 128 × TP 8; 151,669 tokens padded to a multiple of 128.
    assert torch_dist_folder.is_padded(151936, 152576)
    assert torch_dist_folder.is_padded(151669, 151680)
    assert torch_dist_folder.is_padded(41, 48)
    # Llama's vocabulary is not a padded Qwen3's, nor Qwen3's a padded SmolLM2's.
    assert not torch_dist_folder.is_padded(49152, 151936)
    assert not torch_dist_folder.is_padded(128256, 151936)
    assert not torch_dist_folder.is_padded(41, 43)


def test_files_beside_the_tensors_are_carried_and_watched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, megatron, back = save(DENSE, tmp_path / "hf"), tmp_path / "megatron", tmp_path / "back"
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    (hf / "pytorch_model.bin").write_bytes(b"other weights")
    convert.import_checkpoint(hf, megatron)
    convert.export_checkpoint(megatron, back)
    assert (back / "additional_chat_templates" / "tools.jinja").read_text() == "{{ tools }}"
    assert not (back / "pytorch_model.bin").exists()
    (back / "tokenizer.json").write_text('{"a": 2}')
    assert main(["verify", str(hf), str(back)]) == 2
    error = capsys.readouterr().err
    assert "tokenizer.json" in error
    assert "change it there, and convert again" in error
    # Nobody is told to throw the hashes of all tensors away.
    assert "delete" not in error


def test_verify_names_what_differs_in_the_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf, megatron = save(DENSE, tmp_path / "hf"), tmp_path / "megatron"
    convert.import_checkpoint(hf, megatron)
    values = json.loads((hf / "config.json").read_text())
    values |= {"rms_norm_eps": 1e-5}
    (hf / "config.json").write_text(json.dumps(values))
    assert main(["verify", str(hf), str(megatron)]) == 1
    shown = capsys.readouterr().out
    assert "config.json: rms_norm_eps: 1e-05 against 1e-06" in shown
    assert "1 difference" in shown
    # Nor is a checkpoint exported under a configuration that is not its own.
    words = ["export", str(megatron), str(tmp_path / "back"), "--config", str(hf)]
    assert main(words) == 2
    assert "another configuration than the checkpoint's own" in capsys.readouterr().err
