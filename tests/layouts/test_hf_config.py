"""Real models' `config.json`, read without a guess; what is not understood is named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub.errors import StrictDataclassError

from megatron_precision.config.errors import UserError
from megatron_precision.layouts.architectures import hf_shapes
from megatron_precision.layouts.hf_config import defaults_taken, model_from_hf
from megatron_precision.layouts.megatron_checkpoint import slots

COMMON = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "torch_dtype": "bfloat16",
    "use_cache": True,
}
QWEN3_14B = COMMON | {
    "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "bos_token_id": 151643,
    "eos_token_id": 151645, "head_dim": 128, "hidden_size": 5120, "intermediate_size": 17408,
    "max_position_embeddings": 40960, "max_window_layers": 40, "model_type": "qwen3",
    "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": False, "transformers_version": "4.51.0", "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
QWEN3_30B_A3B = QWEN3_14B | {
    "architectures": ["Qwen3MoeForCausalLM"], "decoder_sparse_step": 1, "hidden_size": 2048,
    "intermediate_size": 6144, "max_window_layers": 48, "mlp_only_layers": [],
    "model_type": "qwen3_moe", "moe_intermediate_size": 768, "norm_topk_prob": True,
    "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False,
    "router_aux_loss_coef": 0.001,
}  # fmt: skip
R1_DISTILL_QWEN_1_5B = COMMON | {
    "architectures": ["Qwen2ForCausalLM"], "bos_token_id": 151643, "eos_token_id": 151643,
    "hidden_size": 1536, "intermediate_size": 8960, "max_position_embeddings": 131072,
    "max_window_layers": 21, "model_type": "qwen2", "num_attention_heads": 12,
    "num_hidden_layers": 28, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 10000, "sliding_window": 4096, "tie_word_embeddings": False,
    "transformers_version": "4.44.0", "use_mrope": False, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
LLAMA_3_2_3B = COMMON | {
    "architectures": ["LlamaForCausalLM"], "attention_bias": False, "bos_token_id": 128000,
    "eos_token_id": 128001, "head_dim": 128, "hidden_size": 3072, "intermediate_size": 8192,
    "max_position_embeddings": 131072, "mlp_bias": False, "model_type": "llama",
    "num_attention_heads": 24, "num_hidden_layers": 28, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192, "rope_type": "llama3",
    },
    "tie_word_embeddings": True, "transformers_version": "4.45.0.dev0", "vocab_size": 128256,
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        # The sizes that the models' authors state.
        (QWEN3_14B, 14_768_307_200),
        (QWEN3_30B_A3B, 30_532_122_624),
        (R1_DISTILL_QWEN_1_5B, 1_777_088_000),
        (LLAMA_3_2_3B, 3_212_749_824),
    ],
)
def test_a_real_model_has_its_number_of_parameters(config: dict[str, Any], parameters: int) -> None:
    model = model_from_hf(config)
    assert sum(math.prod(shape) for shape in hf_shapes(model).values()) == parameters
    assert sum(math.prod(slot.shape) for slot in slots(model)) == parameters


def test_transformers_5_writes_the_same_in_other_fields() -> None:
    new = {k: v for k, v in LLAMA_3_2_3B.items() if k not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = {"rope_theta": 500000.0, **LLAMA_3_2_3B["rope_scaling"]}
    new["dtype"] = new.pop("torch_dtype")
    assert model_from_hf(new) == model_from_hf(LLAMA_3_2_3B)
    moe = {k: v for k, v in QWEN3_30B_A3B.items() if k != "num_experts"}
    assert model_from_hf(moe | {"num_local_experts": 128}) == model_from_hf(QWEN3_30B_A3B)


@pytest.mark.parametrize(
    ("config", "field", "value"),
    [
        (QWEN3_14B, "rope_scaling", {"rope_type": "yarn", "factor": 4.0}),
        (QWEN3_14B, "use_sliding_window", True),
        (QWEN3_14B, "attention_bias", True),
        (QWEN3_14B, "hidden_act", "gelu"),
        (QWEN3_14B, "layer_types", ["sliding_attention", "full_attention"]),
        (QWEN3_14B, "quantization_config", {"bits": 4}),
        (LLAMA_3_2_3B, "sliding_window", 4096),
        (LLAMA_3_2_3B, "mlp_bias", True),
        (QWEN3_14B, "rope_theta", "1e6"),
        (QWEN3_14B, "rope_parameters", {"rope_theta": 0}),
        (QWEN3_14B, "rope_theta", 10**400),
        (LLAMA_3_2_3B, "rms_norm_eps", None),
        (
            LLAMA_3_2_3B,
            "rope_scaling",
            {k: v for k, v in LLAMA_3_2_3B["rope_scaling"].items() if k != "factor"},
        ),
        (
            LLAMA_3_2_3B,
            "rope_scaling",
            LLAMA_3_2_3B["rope_scaling"] | {"original_max_position_embeddings": 4096},
        ),
        (QWEN3_30B_A3B, "mlp_only_layers", [0]),
        (QWEN3_30B_A3B, "decoder_sparse_step", 2),
        (QWEN3_30B_A3B, "shared_expert_intermediate_size", 1024),
        (QWEN3_30B_A3B, "num_experts_per_tok", 129),
        (QWEN3_14B, "num_key_value_heads", 7),
        (QWEN3_14B, "head_dim", None),
        (QWEN3_30B_A3B, "num_key_value_heads", None),
        (LLAMA_3_2_3B, "rope_parameters", {"rope_theta": 10000.0}),
    ],
)
def test_a_field_that_is_not_implemented_is_an_error_that_names_it(
    config: dict[str, Any], field: str, value: object
) -> None:
    with pytest.raises(UserError) as caught:
        model_from_hf(config | {field: value})
    assert field in str(caught.value)


def test_all_that_is_missing_is_named_at_once() -> None:
    config = {k: v for k, v in QWEN3_30B_A3B.items() if k not in ("hidden_size", "num_experts")}
    with pytest.raises(UserError) as caught:
        model_from_hf(config)
    places = {problem.where for problem in caught.value.problems}
    assert places == {"config.json: hidden_size", "config.json: num_experts"}


@pytest.mark.parametrize("config", [QWEN3_14B, QWEN3_30B_A3B, R1_DISTILL_QWEN_1_5B, LLAMA_3_2_3B])
def test_what_is_left_out_is_what_transformers_takes_it_to_be(
    config: dict[str, Any], tmp_path: Path
) -> None:
    names = {"rms_norm_eps", "rope_theta", "rope_scaling", "norm_topk_prob", "tie_word_embeddings"}
    path = tmp_path / "config.json"
    path.write_text(json.dumps({k: v for k, v in config.items() if k not in names}))
    theirs, taken = transformers.AutoConfig.from_pretrained(tmp_path), defaults_taken(path)
    model = model_from_hf(json.loads(path.read_text()))
    assert taken.keys() == {"rms_norm_eps", "rope_theta"} | (
        {"norm_topk_prob"} if config is QWEN3_30B_A3B else set()
    )
    assert model.rms_norm_eps == taken["rms_norm_eps"] == theirs.rms_norm_eps
    assert model.rope_theta == taken["rope_theta"] == theirs.rope_parameters["rope_theta"]
    assert model.tie_word_embeddings == theirs.tie_word_embeddings
    if model.num_experts:
        assert model.norm_topk_prob == taken["norm_topk_prob"] == theirs.norm_topk_prob
    path.write_text(json.dumps(config))
    assert defaults_taken(path) == {}


@pytest.mark.parametrize("config", [QWEN3_14B, QWEN3_30B_A3B, R1_DISTILL_QWEN_1_5B, LLAMA_3_2_3B])
@pytest.mark.parametrize("name", ["num_key_value_heads", "head_dim"])
@pytest.mark.parametrize("how", ["left out", "null"])
def test_a_size_is_derived_where_transformers_derives_it_and_asked_for_elsewhere(
    config: dict[str, Any], name: str, how: str
) -> None:
    heads = config["num_attention_heads"]
    fields = config | {"hidden_size": 96 * heads, name: None}
    if how == "left out":
        del fields[name]
    small = {"num_hidden_layers": 1, "num_experts": 2, "num_experts_per_tok": 1}
    try:
        kind = type(transformers.AutoConfig.for_model(config["model_type"]))
        with torch.device("meta"):  # some derive the width of heads only as they build
            made = transformers.AutoModelForCausalLM.from_config(kind(**fields | small))
        attention = made.model.layers[0].self_attn
        theirs = {
            "num_key_value_heads": made.config.num_key_value_heads, "head_dim": attention.head_dim
        }[name]  # fmt: skip
    except (TypeError, ValueError, StrictDataclassError):  # transformers refuses it
        theirs = None
    if theirs == {"num_key_value_heads": heads, "head_dim": 96}[name]:
        assert getattr(model_from_hf(fields), name) == theirs
    else:
        with pytest.raises(UserError, match=name):
            model_from_hf(fields)
