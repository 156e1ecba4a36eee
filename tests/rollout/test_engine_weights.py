"""Which parameters of a vLLM model are written, on modules that stand for its ways of tying."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from megatron_precision.rollout.engine_weights import EngineWeights


def model(tying: str) -> torch.nn.Module:
    """A stack with an embedding and a head as vLLM has them."""
    built, stack = torch.nn.Module(), torch.nn.Module()
    stack.embed_tokens = torch.nn.Embedding(8, 4)
    built.model = stack
    built.lm_head = stack.embed_tokens
    if tying != "one module":  # Qwen in vLLM 0.26
        built.lm_head = torch.nn.Embedding(8, 4)
    if tying == "one weight":  # vLLM 0.32, and Llama in both
        built.lm_head.weight = stack.embed_tokens.weight
    built.logits_processor = SimpleNamespace(head_dtype=None)
    return built


@pytest.mark.parametrize(
    ("tying", "names"),
    [
        ("one module", ["model.embed_tokens.weight"]),
        ("one weight", ["model.embed_tokens.weight"]),
        ("none", ["model.embed_tokens.weight", "lm_head.weight"]),
    ],
)
def test_a_tied_weight_is_written_once_and_never_left_out(tying: str, names: list[str]) -> None:
    found = EngineWeights(model(tying), SimpleNamespace())
    assert [parameter.name for parameter in found.parameters] == names
    assert all(torch.equal(found.reads(name)[0], found._by_name[name].live) for name in names)


def test_a_head_in_another_dtype_multiplies_with_the_parameter_itself() -> None:
    built = model("none")
    built.lm_head.cpu_linear = built.lm_head.num_embeddings_per_partition = None  # as on the CPU
    kernels = {}
    for dtype in (None, torch.float32, torch.float16):
        built.logits_processor = SimpleNamespace(head_dtype=dtype)
        found = EngineWeights(built, SimpleNamespace())
        kernels[dtype] = found._by_name["lm_head.weight"].kernel
    assert kernels == {
        None: "packed linear", torch.float32: "packed linear", torch.float16: "as loaded",
    }  # fmt: skip
