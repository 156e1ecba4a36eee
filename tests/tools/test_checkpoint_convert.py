"""Conversion there and back, on checkpoints that transformers wrote."""

from __future__ import annotations

import dataclasses
import itertools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_precision.checkpoint import manifest
from megatron_precision.config.schema import ModelConfig, ParallelConfig, RunConfig
from megatron_precision.layouts import megatron_checkpoint
from megatron_precision.layouts.megatron import megatron_parameters, megatron_regions
from tests.distributed.harness import run_distributed
from tests.distributed.oracle import DENSE
from tests.tools.hf_folders import MODELS, plant, save, tensors_of
from tools.checkpoint_convert import (
    blocks,
    convert,
    safetensors_folder,
    source,
    torch_dist_folder,
    torch_dist_writer,
    verify,
)
from tools.checkpoint_convert.cli import main


@pytest.fixture(params=list(MODELS))
def saved(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ModelConfig, Path]:
    return MODELS[request.param], save(MODELS[request.param], tmp_path / "hf")


def test_there_and_back_is_bit_exact_and_loads_in_transformers(
    saved: tuple[ModelConfig, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, hf = saved
    megatron, back = tmp_path / "megatron", tmp_path / "back"
    assert main(["import", str(hf), str(megatron)]) == 0
    assert main(["export", str(megatron), str(back)]) == 0
    for a, b in ((hf, megatron), (megatron, back), (hf, back)):
        assert main(["verify", str(a), str(b)]) == 0
    assert "0 differences" in capsys.readouterr().out
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


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if "qwen3" in name else pytest.mark.slow) for name in MODELS],
)
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


def every_layout() -> list[Any]:
    """TP, PP and EP of 1 or 2, for the models that have them."""
    found = []
    for name in MODELS:
        for tp, pp, ep in itertools.product(
            (1, 2), (1, 2), (1, 2) if name == "qwen3_moe" else (1,)
        ):
            found.append(pytest.param(name, tp, pp, ep, id=f"{name} TP{tp} PP{pp} EP{ep}"))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tp", "pp", "ep"), every_layout())
def test_every_layout_there_and_another_back(
    name: str, tp: int, pp: int, ep: int, tmp_path: Path
) -> None:
    """Cut for the opposite layout, loaded and saved by Megatron at this one, exported."""
    model, hf, megatron = MODELS[name], save(MODELS[name], tmp_path / "hf"), tmp_path / "megatron"
    opposite = ParallelConfig(1, 3 - tp, 3 - pp, 3 - ep if model.num_experts else 1)
    convert.import_checkpoint(hf, megatron, layout=opposite)
    world = max(tp * pp, ep * pp)
    layout = ParallelConfig(world, tp, pp, ep, rollout_tp_size=1)
    config = RunConfig("test", precision="bf16", model=model, parallel=layout)
    again, back = tmp_path / "again", tmp_path / "back"
    run_distributed("checkpoint_bodies.load_and_save", world, config, str(megatron), str(again))
    assert main(["export", str(again), str(back), "--config", str(hf)]) == 0
    before, after = tensors_of(hf), tensors_of(back)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[n].view(torch.int16), after[n].view(torch.int16)) for n in before)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        pytest.param("qwen3", ["--tp", "2", "--pp", "2"], marks=pytest.mark.slow),
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


@pytest.mark.parametrize("name", ["qwen3", "qwen3_moe"])
def test_both_sides_compute_the_same_logits(name: str, tmp_path: Path) -> None:
    hf, megatron = save(MODELS[name], tmp_path / "hf"), tmp_path / "megatron"
    convert.import_checkpoint(hf, megatron)
    words = [sys.executable, "-m", "tools.checkpoint_convert", "verify", str(megatron), str(hf)]
    done = subprocess.run([*words, "--logits"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "64 random tokens" in done.stdout
    assert done.stderr == ""
    assert "the same choice at 100.0%" in done.stdout


# ---- dtypes ------------------------------------------------------------------------------


def test_a_change_of_dtype_reports_what_it_costs(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = save(DENSE, tmp_path / "hf")
    name = "model.layers.1.mlp.down_proj.weight"
    plant(hf, name, [1e5, -3e38, 2.0**-24, 2.0**-26, 2.0**-15, 1.0])
    assert main(["audit", str(hf), "--dtype", "fp16"]) == 1
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.endswith(name))
    nonfinite, overflowed, zeroed, subnormal = (int(word) for word in line.split()[:4])
    assert (nonfinite, overflowed, zeroed) == (0, 2, 1)
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
    # What was cast is compared with its source as the cast would be.
    assert main(["verify", str(hf), str(target)]) == 1
    assert main(["verify", str(hf), str(target), "--dtype", "fp16"]) == 0
    row = tensors_of(back)[name].view(-1)
    assert row.dtype == torch.float16
    # Readers load weights in the dtype that the configuration says.
    assert transformers.AutoConfig.from_pretrained(back).dtype == torch.float16
    assert row[:6].tolist() == [65504.0, -65504.0, 2.0**-24, 0.0, 2.0**-15, 1.0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", list(MODELS))
def test_vllm_loads_an_export_as_it_stands(kind: str, tmp_path: Path) -> None:
    # Heads of 32 for vLLM's attention; hidden = 6 × 32, from which two architectures derive them.
    model = dataclasses.replace(
        MODELS[kind],
        head_dim=32,
        hidden_size=192,
        moe_intermediate_size=128 if kind == "qwen3_moe" else 0,
        max_position_embeddings=128,
    )
    hf, megatron, back = save(model, tmp_path / "hf"), tmp_path / "megatron", tmp_path / "back"
    convert.import_checkpoint(hf, megatron)
    convert.export_checkpoint(megatron, back, torch.float32)
    alone = ParallelConfig(1, tp_size=1, rollout_tp_size=1)
    config = RunConfig("test", precision="fp32", model=model, parallel=alone)
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8]]
    scores = run_distributed("checkpoint_bodies.engine_scores", 1, config, str(back), prompts)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(back, dtype=torch.float32)
    for prompt, score in zip(prompts, scores, strict=True):
        with torch.no_grad():
            logprobs = theirs(torch.tensor([prompt])).logits[0].log_softmax(-1)
        expected = logprobs[:-1].gather(1, torch.tensor(prompt[1:])[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(score), expected, atol=1e-4, rtol=0)


def test_fp16_hurts_nothing_that_it_can_hold(tmp_path: Path) -> None:
    hf = save(DENSE, tmp_path / "hf", torch.float16)
    part = convert.import_checkpoint(hf, tmp_path / "wide", torch.float32)
    assert not any(loss.any for loss in part.losses.values())


def test_audit_tells_what_is_stored_as_inf_or_nan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hf = save(DENSE, tmp_path / "hf")
    plant(hf, "model.norm.weight", [math.inf, math.nan, -math.inf])
    assert main(["audit", str(hf), "--dtype", "bf16"]) == 1
    shown = capsys.readouterr().out
    (line,) = (line for line in shown.splitlines() if line.endswith("model.norm.weight"))
    assert line.split()[:2] == ["3", "0"]


def test_fp64_is_rounded_once(tmp_path: Path) -> None:
    """Through FP32, 1 + 2^-11 + 2^-40 would become a tie, and round down."""
    generator = torch.Generator().manual_seed(0)
    wide = torch.randn(4096, generator=generator, dtype=torch.float64)
    ties = 1 + torch.arange(64, dtype=torch.float64) * 2**-10 + 2**-11
    wide = torch.cat([wide, wide * 1e-6, ties + 2**-40, ties - 2**-40, ties, -ties - 2**-40])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        found = torch.empty(wide.shape, dtype=dtype)
        verify.cast(wide, found, verify.Loss())
        if dtype == torch.float16:
            assert np.array_equal(found.numpy(), wide.numpy().astype(np.float16))
        # No neighbour is nearer.
        error = (found.double() - wide).abs()
        for towards in (-math.inf, math.inf):
            other = torch.nextafter(found, torch.full_like(found, towards)).double()
            assert bool((error <= (other - wide).abs()).all())


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


# ---- the table -----------------------------------------------------------------------------


def entries(model: ModelConfig) -> list[str]:
    """One parameter of each kind that a Megatron checkpoint of a model has."""
    names = [name for name, _ in megatron_parameters(model, model.vocab_size)]
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
        regions = megatron_regions(name, shape, model, at)
        if name != parameter:
            return regions
        if len(regions) > 1:  # fused: the first and the last of equal shape change places
            a, b = regions[-2:]
            swapped = [
                dataclasses.replace(a, view=b.view, index=b.index),
                dataclasses.replace(b, view=a.view, index=a.index),
            ]
            return [*regions[:-2], *swapped]
        # Another tensor of its shape, or of its width with more rows.
        held = source.open_source(hf).tensors
        others = {n: i.shape for n, i in held.items() if n != regions[0].hf_name}
        same = [n for n, s in others.items() if s == shape]
        wrong, *_ = same or [n for n, s in others.items() if s[1:] == shape[1:] and s > shape]
        return [dataclasses.replace(regions[0], hf_name=wrong)]

    with monkeypatch.context() as patched:
        patched.setattr(megatron_checkpoint, "megatron_regions", broken)
        convert.import_checkpoint(hf, tmp_path / "megatron")
    # The manifest knows the true hashes; a folder without one must be caught too.
    (tmp_path / "megatron" / manifest.FILE).unlink()
    assert main(["verify", str(hf), str(tmp_path / "megatron")]) == 1


@pytest.mark.parametrize("kind", list(MODELS))
def test_the_runs_of_a_region_are_its_view(kind: str) -> None:
    """Rows by `row_runs` against the strided view that loads and gathers use."""
    for slot in megatron_checkpoint.slots(MODELS[kind]):
        ids = torch.arange(math.prod(slot.shape)).view(slot.shape)
        for region in slot.regions:
            expected = ids.view(region.view)[region.spans].reshape(region.shape)
            runs = megatron_checkpoint.row_runs(slot, region)
            rows = [ids[run.slot_row : run.slot_row + run.rows] for run in runs]
            assert torch.equal(torch.cat(rows), expected)
            assert [run.hf_row for run in runs] == [0, *(_ends(runs)[:-1])]
            half = region.shape[0] // 2
            parts = [run.within(half, region.shape[0]) for run in runs]
            rows = [ids[p.slot_row : p.slot_row + p.rows] for p in parts if p is not None]
            assert torch.equal(torch.cat(rows), expected[half:])


@given(st.data())
@settings(max_examples=200, deadline=None)
def test_parts_of_any_blocks_fill_a_slot_once(data: st.DataObject) -> None:
    """`shards` of a slot that comes in blocks of any size: each element in one box, at its place,
    and no box of a divided tensor reaches over two ranks."""
    model = MODELS[data.draw(st.sampled_from(sorted(MODELS)))]
    slot = data.draw(st.sampled_from(megatron_checkpoint.slots(model)))
    size = data.draw(st.sampled_from([1, 2]))
    whole = torch.arange(math.prod(slot.shape)).view(slot.shape)
    cuts = data.draw(st.sets(st.integers(1, max(1, slot.shape[0] - 1)), max_size=5))
    ends = sorted({cut for cut in cuts if cut < slot.shape[0]} | {slot.shape[0]})
    filled = torch.full(slot.shape, -1)
    for begin, end in itertools.pairwise([0, *ends]):
        for start, box in torch_dist_writer.shards(slot, begin, whole[begin:end], size):
            at = tuple(slice(a, a + n) for a, n in zip(start, box.shape, strict=True))
            assert bool((filled[at] == -1).all())
            filled[at] = box
            if slot.key.endswith(("linear_proj.weight", "linear_fc2.weight")):
                assert box.shape[1] == slot.shape[1] // size
            runs = {"linear_qkv.weight": size, "linear_fc1.weight": 2 * size}
            for name, count in runs.items():
                if slot.key.endswith(name):
                    rows = slot.shape[0] // count
                    assert start[0] // rows == (start[0] + box.shape[0] - 1) // rows
    assert torch.equal(filled, whole)


def _ends(runs: list[megatron_checkpoint.RowRun]) -> list[int]:
    return [run.hf_row + run.rows for run in runs]


def test_blocks_put_together_are_the_tensor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large tensors are read and written in several blocks: here every one is."""
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 300)
    hf = save(DENSE, tmp_path / "hf")
    layout = ParallelConfig(1, tp_size=2, rollout_tp_size=1)
    convert.import_checkpoint(hf, tmp_path / "megatron", layout=layout)
    convert.export_checkpoint(tmp_path / "megatron", tmp_path / "back")
    before, after = tensors_of(hf), tensors_of(tmp_path / "back")
    assert all(torch.equal(before[name], after[name]) for name in before)
    opened = source.open_source(tmp_path / "megatron")
    assert len(list(opened.blocks("lm_head.weight"))) > 4
    assert safetensors_folder.SafetensorsFolder(tmp_path / "back").tensors == opened.tensors
