"""Conversion there and back, on checkpoints that transformers wrote; faults, named."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from harness import run_distributed
from oracle import DENSE, MOE, random_hf_model
from safetensors.torch import load_file, save_file

from megatron_precision.config import ModelConfig, ParallelConfig, RunConfig
from megatron_precision.errors import UserError
from megatron_precision.weights import megatron_checkpoint
from megatron_precision.weights.megatron_layout import megatron_pieces
from tools.checkpoint_convert import (
    convert,
    manifest,
    safetensors_folder,
    source,
    torch_dist_folder,
)
from tools.checkpoint_convert.cli import main

MODELS = {
    "qwen3": DENSE,
    "qwen3_moe": MOE,
    "qwen2": dataclasses.replace(DENSE, model_type="qwen2"),
    "llama": dataclasses.replace(
        DENSE,
        model_type="llama",
        tie_word_embeddings=True,
        rope_theta=500000.0,
        rope_scaling_factor=8.0,
    ),
}


def save(model: ModelConfig, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """A checkpoint as transformers saves it, in several shards, with files beside it."""
    random_hf_model(model).to(dtype).save_pretrained(folder, max_shard_size="20KB")
    (folder / "tokenizer.json").write_text('{"a": 1}', encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    return folder


@pytest.fixture(params=list(MODELS))
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ModelConfig, Path]:
    return MODELS[request.param], save(MODELS[request.param], tmp_path / "hf")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """By the safetensors library, not by the converter."""
    return {n: t for file in folder.glob("*.safetensors") for n, t in load_file(file).items()}


def test_there_and_back_is_bit_exact_and_loads_in_transformers(
    saved: tuple[ModelConfig, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, hf = saved
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    assert main(["import", str(hf), str(megatron)]) == 0
    assert main(["export", str(megatron), str(back)]) == 0
    for a, b in ((hf, megatron), (megatron, back), (hf, back)):
        assert main(["verify", str(a), str(b)]) == 0
    assert "0 differ" in capsys.readouterr().out
    before, after = tensors_of(hf), tensors_of(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n].view(torch.int16), after[n].view(torch.int16)) for n in before)
    for name in ("config.json", "tokenizer.json", "chat_template.jinja"):
        assert (hf / name).read_bytes() == (back / name).read_bytes()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(back, dtype=torch.bfloat16)
    expected = transformers.AutoModelForCausalLM.from_pretrained(hf, dtype=torch.bfloat16)
    prompt = torch.tensor([[1, 5, 7, 2]])
    assert torch.equal(loaded(prompt).logits, expected(prompt).logits)
    assert model.vocab_size == loaded.config.vocab_size


LAYOUTS = {
    "qwen3": (ParallelConfig(2, tp_size=2, rollout_tp_size=2), "TP2"),
    "qwen2": (ParallelConfig(2, tp_size=1, pp_size=2, rollout_tp_size=2), "PP2"),
    "llama": (ParallelConfig(2, tp_size=2, rollout_tp_size=2), "TP2"),
    "qwen3_moe": (ParallelConfig(2, tp_size=1, ep_size=2, rollout_tp_size=2), "EP2"),
}


@pytest.mark.parametrize("name", list(MODELS))
def test_megatron_loads_it_at_another_layout_and_what_it_saves_exports(
    name: str, tmp_path: Path
) -> None:
    model, hf, megatron = MODELS[name], save(MODELS[name], tmp_path / "hf"), tmp_path / "megatron"
    convert.import_checkpoint(hf, megatron)
    config = RunConfig("test", precision="bf16", model=model, parallel=LAYOUTS[name][0])
    again = tmp_path / "again"
    held = run_distributed("checkpoint_bodies.load_and_save", 2, config, str(megatron), str(again))
    before = tensors_of(hf)
    for tensor_name, tensor in before.items():
        assert torch.equal(held[tensor_name], tensor.float()), tensor_name
    # Megatron's own checkpoint carries no configuration.
    back = tmp_path / "back"
    assert main(["export", str(again), str(back), "--config", str(hf)]) == 0
    assert main(["verify", str(hf), str(back)]) == 0


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("qwen3", ["--tp", "2", "--pp", "2"]),
        ("qwen3_moe", ["--tp", "2", "--ep", "2", "--etp", "2"]),
    ],
)
def test_files_cut_for_a_layout_and_written_by_several_processes_hold_the_same(
    name: str, options: list[str], tmp_path: Path
) -> None:
    hf, megatron, back = save(MODELS[name], tmp_path / "hf"), tmp_path / "megatron", tmp_path / "b"
    assert main(["import", str(hf), str(megatron), "--workers", "2", *options]) == 0
    assert len(list(megatron.glob("*.distcp"))) > 1
    assert main(["export", str(megatron), str(back), "--workers", "2"]) == 0
    assert len(list(back.glob("*.safetensors"))) > 1
    assert main(["verify", str(hf), str(back)]) == 0


def test_a_part_for_one_rank_is_one_box(tmp_path: Path) -> None:
    """What a rank of the layout reads, Megatron's own sharding says: nothing of another's."""
    hf = save(DENSE, tmp_path / "hf")
    layout = ParallelConfig(1, tp_size=2, rollout_tp_size=1)
    convert.import_checkpoint(hf, tmp_path / "megatron", layout=layout)
    opened = source.open_source(tmp_path / "megatron")
    assert isinstance(opened, torch_dist_folder.TorchDistFolder)
    known = opened._metadata.state_dict_metadata
    boxes = {
        key.removeprefix("decoder.layers."): [tuple(chunk.sizes) for chunk in known[key].chunks[:4]]
        for key in known
        if key.startswith("decoder.layers.") and key.endswith(".weight")
    }
    # Two layers × two ranks; the MLP's first layer has a gate and an up part a rank.
    assert boxes["self_attention.linear_qkv.weight"] == [(1, 40, 24)] * 4
    assert boxes["self_attention.linear_proj.weight"] == [(1, 24, 24)] * 4
    assert boxes["mlp.linear_fc1.weight"] == [(1, 20, 24)] * 4
    assert boxes["mlp.linear_fc2.weight"] == [(1, 24, 20)] * 4


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


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_both_sides_compute_the_same_logits(name: str, tmp_path: Path) -> None:
    hf, megatron = save(MODELS[name], tmp_path / "hf"), tmp_path / "megatron"
    convert.import_checkpoint(hf, megatron)
    words = [sys.executable, "-m", "tools.checkpoint_convert", "verify", str(megatron), str(hf)]
    done = subprocess.run([*words, "--logits"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "64 random tokens" in done.stdout
    assert "the same choice at 100.0%" in done.stdout


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


# ---- dtypes ------------------------------------------------------------------------------


def plant(hf: Path, name: str, values: list[float]) -> None:
    """Overwrite the first elements of a tensor."""
    for file in hf.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            flat = tensors[name].view(-1)
            flat[: len(values)] = torch.tensor(values, dtype=flat.dtype)
            save_file(tensors, file, {"format": "pt"})


def test_a_change_of_dtype_reports_what_it_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = save(DENSE, tmp_path / "hf")
    name = "model.layers.1.mlp.down_proj.weight"
    plant(hf, name, [1e5, -3e38, 2.0**-24, 2.0**-26, 2.0**-15, 1.0])
    assert main(["audit", str(hf), "--dtype", "fp16"]) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.endswith(name))
    overflowed, zeroed, subnormal = (int(word) for word in line.split()[:3])
    assert (overflowed, zeroed) == (2, 1)
    assert subnormal >= 2
    target = tmp_path / "fp16"
    assert main(["import", str(hf), str(target), "--dtype", "fp16"]) == 2
    error = capsys.readouterr().err
    assert name in error
    assert "2 of " in error
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]
    assert main(["import", str(hf), str(target), "--dtype", "fp16", "--allow-overflow"]) == 0
    back = tmp_path / "back"
    assert main(["export", str(target), str(back)]) == 0
    row = tensors_of(back)[name].view(-1)
    assert row.dtype == torch.float16
    # Readers load weights in the dtype that the configuration says.
    assert transformers.AutoConfig.from_pretrained(back).dtype == torch.float16
    assert row[:6].tolist() == [65504.0, -65504.0, 2.0**-24, 0.0, 2.0**-15, 1.0]


def test_fp16_hurts_nothing_that_it_can_hold(tmp_path: Path) -> None:
    hf = save(DENSE, tmp_path / "hf", torch.float16)
    part = convert.import_checkpoint(hf, tmp_path / "wide", torch.float32)
    assert not any(loss.any for loss in part.losses.values())


def test_inspect_lists_what_a_checkpoint_holds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = save(DENSE, tmp_path / "hf")
    convert.import_checkpoint(hf, tmp_path / "megatron")
    for folder, last in ((hf, "no manifest"), (tmp_path / "megatron", "hashes of every tensor")):
        assert main(["inspect", str(folder)]) == 0
        shown = capsys.readouterr().out
        assert "model.layers.1.self_attn.k_norm.weight  bfloat16  [8]" in shown
        assert shown.rstrip().endswith(last)


# ---- faults ------------------------------------------------------------------------------


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


def break_architecture(hf: Path) -> str:
    values = json.loads((hf / "config.json").read_text())
    (hf / "config.json").write_text(json.dumps(values | {"model_type": "qwen4"}))
    return "qwen3"


@pytest.mark.parametrize(
    "damage",
    [break_missing, break_shard, break_size, break_config, break_shape, break_architecture],
)
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
    assert not (tmp_path / "other.partial").exists()


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
    assert main(["verify", str(hf), str(tmp_path / side)]) == 1
    shown = capsys.readouterr().out
    assert "model.layers.0.mlp.down_proj.weight" in shown
    assert "1 differ" in shown


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path) -> None:
    hf = save(DENSE, tmp_path / "hf")
    convert.import_checkpoint(hf, tmp_path / "megatron")

    class Trap:
        def __reduce__(self):  # type: ignore[no-untyped-def]
            return (open, (str(tmp_path / "sprung"), "w"))

    metadata = tmp_path / "megatron" / torch_dist_folder.METADATA
    data = pickle.dumps(Trap())
    metadata.write_bytes(data + b"\0" * (metadata.stat().st_size - len(data)))
    with pytest.raises(UserError, match="has no place in checkpoint metadata"):
        source.open_source(tmp_path / "megatron")
    assert not (tmp_path / "sprung").exists()


def entries(model: ModelConfig) -> list[str]:
    """One parameter of each kind that a Megatron checkpoint of a model has."""
    names = [name for name, _ in megatron_checkpoint._parameters(model)]
    kinds = {"".join("#" if c.isdigit() else c for c in name): name for name in names}
    return list(kinds.values())


@pytest.mark.parametrize(
    ("kind", "parameter"), [(kind, name) for kind in MODELS for name in entries(MODELS[kind])]
)
def test_every_broken_entry_of_the_table_is_caught_by_verify(
    kind: str, parameter: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = save(MODELS[kind], tmp_path / "hf")

    def broken(name, shape, model, at):  # type: ignore[no-untyped-def]
        pieces = megatron_pieces(name, shape, model, at)
        if name != parameter:
            return pieces
        if len(pieces) > 1:  # fused: the first and the last of equal shape change places
            a, b = pieces[-2:]
            swapped = [
                dataclasses.replace(a, view=b.view, index=b.index),
                dataclasses.replace(b, view=a.view, index=a.index),
            ]
            return [*pieces[:-2], *swapped]
        # Another tensor of its shape, or of its width with more rows.
        held = source.open_source(hf).tensors
        others = {n: i.shape for n, i in held.items() if n != pieces[0].hf_name}
        same = [n for n, s in others.items() if s == shape]
        wrong, *_ = same or [n for n, s in others.items() if s[1:] == shape[1:] and s > shape]
        return [dataclasses.replace(pieces[0], hf_name=wrong)]

    with monkeypatch.context() as patched:
        patched.setattr(megatron_checkpoint, "megatron_pieces", broken)
        convert.import_checkpoint(hf, tmp_path / "megatron")
    # The manifest knows the true hashes; a folder without one must be caught too.
    (tmp_path / "megatron" / manifest.FILE).unlink()
    assert main(["verify", str(hf), str(tmp_path / "megatron")]) == 1


def test_blocks_put_together_are_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large tensors are read and written in several blocks: here every one is."""
    monkeypatch.setattr(source, "BLOCK_BYTES", 300)
    hf = save(DENSE, tmp_path / "hf")
    convert.import_checkpoint(hf, tmp_path / "megatron")
    convert.export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    before, after = tensors_of(hf), tensors_of(tmp_path / "back")
    assert all(torch.equal(before[name], after[name]) for name in before)
    opened = source.open_source(tmp_path / "megatron")
    assert len(list(opened.blocks("lm_head.weight"))) > 4
    assert safetensors_folder.SafetensorsFolder(tmp_path / "back").tensors == opened.tensors
