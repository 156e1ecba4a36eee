"""Checkpoints and the oracle model: names on disk, transformers' own in memory."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers

from megatron_precision.config.schema import ModelConfig
from megatron_precision.layouts.architectures import hf_shapes
from megatron_precision.layouts.hf_files import build_hf_model, read_checkpoint, write_checkpoint
from tests.distributed.oracle import DENSE, MOE, checkpoint, random_hf_model

TIED = dataclasses.replace(DENSE, tie_word_embeddings=True)
MODELS = {"dense": DENSE, "tied": TIED, "MoE": MOE}
every_model = pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)


@every_model
def test_the_shapes_are_those_of_transformers(model: ModelConfig) -> None:
    tensors = checkpoint(model, random_hf_model(model))
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == hf_shapes(model)


@every_model
def test_transformers_reads_the_checkpoint_that_we_write(
    model: ModelConfig, tmp_path: Path
) -> None:
    built = random_hf_model(model)
    tensors = checkpoint(model, built)
    write_checkpoint(tmp_path, model, tensors)
    assert read_checkpoint(tmp_path).keys() == tensors.keys()
    loaded, report = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
    with torch.no_grad():
        torch.testing.assert_close(loaded(tokens).logits, built(tokens).logits)


@every_model
def test_the_model_is_built_from_any_float_dtype(model: ModelConfig) -> None:
    built = random_hf_model(model)
    halves = {name: tensor.half() for name, tensor in checkpoint(model, built).items()}
    again = build_hf_model(model, halves)
    for name, tensor in checkpoint(model, again).items():
        assert torch.equal(tensor, halves[name].float())


def test_tensors_of_another_model_are_refused_by_name() -> None:
    tensors = checkpoint(DENSE, random_hf_model(DENSE))
    tensors["model.extra.weight"] = tensors.pop("model.norm.weight")
    with pytest.raises(ValueError, match=r"missing.*model\.norm.*unexpected.*model\.extra"):
        build_hf_model(DENSE, tensors)
