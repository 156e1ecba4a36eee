"""A checkpoint's `config.json`, both ways, and never by a guess.

Every field of a known architecture is either read into a `ModelConfig`, required to have the one
value that Megatron's model here implements, or known to say nothing about the weights. A field
that is none of these is an error that names it. A field that is left out means what transformers
takes it to mean (`DEFAULTS`); `defaults_taken` says which were.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from megatron_precision.config.errors import Problem, UserError, unknown_name
from megatron_precision.config.schema import ModelConfig
from megatron_precision.layouts.architectures import ARCHITECTURES, architecture

# Megatron Core's scaled rotary embedding has these constants written in, and the factor free.
LLAMA3_SCALING = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

# The weights of a checkpoint: one file, or the index of several.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


def hf_config(model: ModelConfig, dtype: str) -> dict[str, object]:
    """Write a model as a `config.json` that transformers and vLLM read.

    Args:
        dtype: torch's name of the stored dtype, for example `float32`.
    """
    config: dict[str, object] = {
        "architectures": [architecture(model).hf_class],
        "model_type": model.model_type,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_position_embeddings,
        "rms_norm_eps": model.rms_norm_eps,
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tie_word_embeddings,
        "attention_dropout": 0.0,
        "torch_dtype": dtype,
    }
    # Qwen2 has its biases without saying so.
    if model.model_type != "qwen2":
        config["attention_bias"] = False
    if model.rope_scaling_factor != 1.0:
        config["rope_scaling"] = {
            "rope_type": "llama3",
            "factor": model.rope_scaling_factor,
            **LLAMA3_SCALING,
        }
    if model.num_experts:
        config |= {
            "num_experts": model.num_experts,
            "num_experts_per_tok": model.num_experts_per_tok,
            "moe_intermediate_size": model.moe_intermediate_size,
            "norm_topk_prob": model.norm_topk_prob,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "output_router_logits": False,
            "router_aux_loss_coef": 0.0,
        }
    return config


# Fields that say nothing about what the weights compute.
_IGNORED = frozenset(
    {
        "architectures", "model_type", "torch_dtype", "dtype", "use_cache",
        "transformers_version", "transformers.js_config", "bos_token_id", "eos_token_id",
        "pad_token_id", "unk_token_id", "attention_dropout", "initializer_range", "is_llama_config",
        "output_router_logits", "router_aux_loss_coef", "max_window_layers", "num_experts_per_tok",
        "norm_topk_prob",
    }
)  # fmt: skip
_SIZES = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "max_position_embeddings",
)  # fmt: skip
_EXPERT_FIELDS = ("num_experts", "num_experts_per_tok", "moe_intermediate_size")
_OPTIONAL = frozenset(
    {"num_key_value_heads", "head_dim", "rope_theta", "rope_scaling", "rope_parameters",
     "rms_norm_eps", "tie_word_embeddings", "sliding_window", "layer_types"}
)  # fmt: skip
# Sizes that transformers derives for some architectures, where they are left out.
_DERIVED = frozenset({"num_key_value_heads", "head_dim"})
# What the weights compute depends on these and shows in no shape, and real files leave them out
# (Llama 2's has no `rope_theta`). They are transformers' values, the same for all architectures.
DEFAULTS = {"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "norm_topk_prob": False}
# The one value of each that Megatron's model here implements.
_REQUIRED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "hidden_act": (lambda v: v == "silu", "silu"),
    "attention_bias": (lambda v: v is False, "false"),
    "mlp_bias": (lambda v: v is False, "false"),
    "use_sliding_window": (lambda v: v is False, "false"),
    "use_mrope": (lambda v: v is False, "false"),
    "rope_interleaved": (lambda v: v is False, "false"),
    "pretraining_tp": (lambda v: v == 1, "1"),
    "decoder_sparse_step": (lambda v: v == 1, "1: experts in every layer"),
    "mlp_only_layers": (lambda v: v == [], "[]: experts in every layer"),
}


def weights_missing(folder: Path) -> list[Problem]:
    """Say what a folder lacks of a checkpoint's weights, without opening the files."""
    index = folder / INDEX
    if not index.is_file():
        if (folder / SINGLE).is_file():
            return []
        expected = f"{SINGLE}, or {INDEX} with its shards"
        return [Problem("no weights", str(folder), "neither file", expected)]
    try:
        named = read_object(index, "the index of the shards")["weight_map"]
    except UserError as wrong:
        return list(wrong.problems)
    except KeyError:
        return [Problem("not an index of shards", str(index), "no weight_map", "a weight_map")]
    missing = sorted({file for file in named.values() if not (folder / file).is_file()})
    expected = f"every shard that {INDEX} names"
    return [Problem("a shard is missing", str(folder / f), "nothing", expected) for f in missing]


def read_model(path: Path) -> ModelConfig:
    """Read the model of a `config.json`.

    Raises:
        UserError: where the file cannot be read, or `model_from_hf` refuses what it says.
    """
    return model_from_hf(read_object(path, "the model's configuration"), str(path))


def defaults_taken(path: Path) -> dict[str, object]:
    """Return the fields that a `config.json` leaves to transformers' defaults, with these.

    Raises:
        UserError: as `read_model`.
    """
    values = read_object(path, "the model's configuration")
    said = {**values, **_rope(values)}
    experts = model_from_hf(values, str(path)).num_experts > 0
    return {
        name: value
        for name, value in DEFAULTS.items()
        if name not in said and (experts or name != "norm_topk_prob")
    }


def read_object(path: Path, what: str, remedy: str = "") -> dict[str, Any]:
    """Read the object of a JSON file.

    Args:
        what: it is, for messages.
        remedy: for whoever has a file that holds anything else.

    Raises:
        UserError: where the file cannot be read, or holds anything else.
    """
    kinds = {list: "a list", str: "a text", bool: "true or false", type(None): "null"}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(values, dict):
            return values
        got = f"{kinds.get(type(values), 'a number')}, not an object"
    except OSError as wrong:
        got = str(wrong.strerror).lower()
    except UnicodeDecodeError:
        got = "bytes that are no text in UTF-8"
    except json.JSONDecodeError as wrong:
        got = f"no JSON from line {wrong.lineno}, column {wrong.colno} on"
    except (ValueError, RecursionError):  # JSON, but not for Python
        got = "a number too long to be read, or lists too deep"
    raise UserError(Problem(f"cannot read {what}", str(path), got, "a JSON object", remedy))


def model_from_hf(values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """Build the model that a `config.json` describes, by transformers 4's or 5's names.

    Args:
        where: the file, for messages.

    Raises:
        UserError: lists an unknown architecture, or every field that is missing, has no meaning
            here, or has a value that is not implemented.
    """
    values = _by_one_name(values)
    if "model_type" not in values:
        raise UserError(_missing("model_type", where))
    kind = values["model_type"]
    if kind not in ARCHITECTURES:
        raise UserError(
            unknown_name("architecture", f"{where}: model_type", str(kind), list(ARCHITECTURES))
        )
    problems = list(_config_problems(values, where))
    if problems:
        raise UserError(problems)
    rope = _rope(values)
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    experts = ARCHITECTURES[kind].experts
    return ModelConfig(
        model_type=kind,
        **{name: values[name] for name in _SIZES},
        num_key_value_heads=values.get("num_key_value_heads") or heads,
        head_dim=values.get("head_dim") or hidden // heads,
        rope_theta=float(rope.get("rope_theta", DEFAULTS["rope_theta"])),
        rope_scaling_factor=float(rope.get("factor", 1.0)),
        rms_norm_eps=values.get("rms_norm_eps", DEFAULTS["rms_norm_eps"]),
        tie_word_embeddings=values.get("tie_word_embeddings", False),
        **({name: values[name] for name in _EXPERT_FIELDS} if experts else {}),
        norm_topk_prob=(
            values.get("norm_topk_prob", DEFAULTS["norm_topk_prob"]) if experts else True
        ),
    )


def _missing(name: str, where: str) -> Problem:
    return Problem("missing field", f"{where}: {name}", "nothing", "the field")


def _by_one_name(values: Mapping[str, Any]) -> dict[str, Any]:
    """Rename the field that transformers 5 writes under another name."""
    values = dict(values)
    if "num_local_experts" in values and "num_experts" not in values:
        values["num_experts"] = values.pop("num_local_experts")
    return values


def _config_problems(values: Mapping[str, Any], where: str) -> Iterator[Problem]:
    kind = values["model_type"]
    experts = ARCHITECTURES[kind].experts
    read = {*_SIZES, *(_EXPERT_FIELDS if experts else ())}
    needed = read | (_DERIVED - ARCHITECTURES[kind].derived)
    for name in sorted(needed - values.keys()):
        yield _missing(name, where)
    wrong = list(_type_problems(values, read, where))
    yield from wrong or _size_problems(values, where)
    for name in sorted(values.keys() - read - _IGNORED - _OPTIONAL - _REQUIRED.keys()):
        if name.startswith("_"):  # transformers' own notes
            continue
        yield Problem(
            f"a field that is not understood for {kind}",
            f"{where}: {name}",
            repr(values[name]),
            "a field that changes nothing, or one that this version implements",
        )
    for name, (fits, expected) in _REQUIRED.items():
        if name in values and not fits(values[name]):
            yield Problem(
                f"not implemented for {kind}", f"{where}: {name}", repr(values[name]), expected
            )
    window = values.get("sliding_window")
    # Qwen2 names a window that it does not use.
    if window is not None and values.get("use_sliding_window", True):
        yield Problem("not implemented", f"{where}: sliding_window", repr(window), "no window")
    if set(values.get("layer_types") or ["full_attention"]) != {"full_attention"}:
        yield Problem(
            "not implemented",
            f"{where}: layer_types",
            repr(values["layer_types"]),
            "full_attention in every layer",
        )
    for name in ("rope_scaling", "rope_parameters"):
        if not isinstance(values.get(name) or {}, dict):
            yield Problem(
                "a value of another kind", f"{where}: {name}", repr(values[name]), "an object"
            )
            return
    yield from _rope_problems(values, where)


def _type_problems(values: Mapping[str, Any], sizes: set[str], where: str) -> Iterator[Problem]:
    """Check types: sizes are positive integers, constants numbers; null needs a default."""

    def problem(name: str, expected: str) -> Problem:
        return Problem("a value of another kind", f"{where}: {name}", repr(values[name]), expected)

    nulls = ARCHITECTURES[values["model_type"]].derived_from_null
    for name in sorted((sizes | _DERIVED) & values.keys()):
        value = values[name]
        if value is None and name in nulls:
            continue
        if type(value) is not int or value < 1:
            yield problem(name, "a positive integer")
    if not _positive(values.get("rms_norm_eps", 1.0)):
        yield problem("rms_norm_eps", "a positive number")
    for name in ("tie_word_embeddings", "norm_topk_prob"):
        if type(values.get(name, False)) is not bool:
            yield problem(name, "true or false")


def _size_problems(values: Mapping[str, Any], where: str) -> Iterator[Problem]:
    """List sizes that no model can have together."""
    heads, kv_heads = values.get("num_attention_heads"), values.get("num_key_value_heads")
    if heads and kv_heads and heads % kv_heads:
        yield Problem(
            "query heads that KV heads do not divide", f"{where}: num_key_value_heads",
            f"{kv_heads} for {heads} heads", f"a divisor of {heads}",
        )  # fmt: skip
    hidden = values.get("hidden_size")
    if heads and hidden and not values.get("head_dim") and hidden % heads:
        yield Problem(
            "missing field", f"{where}: head_dim", f"nothing, and {hidden} / {heads} is no size",
            "the field",
        )  # fmt: skip
    experts, chosen = values.get("num_experts"), values.get("num_experts_per_tok")
    if experts and chosen and chosen > experts:
        yield Problem(
            "more experts a token than there are", f"{where}: num_experts_per_tok", str(chosen),
            f"at most {experts}",
        )  # fmt: skip


def _positive(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return 0 < value <= sys.float_info.max


def _rope(values: Mapping[str, Any]) -> dict[str, Any]:
    """Collect rotary settings in one dictionary: transformers 4 spreads them over two fields."""
    rope = {"rope_theta": values["rope_theta"]} if "rope_theta" in values else {}
    rope |= values.get("rope_scaling") or {}
    return rope | (values.get("rope_parameters") or {})


def _rope_problems(values: Mapping[str, Any], where: str) -> Iterator[Problem]:
    rope = _rope(values)
    places = {"rope_theta": values} | {
        name: values.get(name) or {} for name in ("rope_scaling", "rope_parameters")
    }
    said = {name: held["rope_theta"] for name, held in places.items() if "rope_theta" in held}
    if any(base != rope["rope_theta"] for base in said.values()):
        yield Problem(
            "several rotary bases", f"{where}: rope_theta",
            ", ".join(f"{base!r} in {name}" for name, base in said.items()), "one",
            "readers differ in which they take: leave one",
        )  # fmt: skip
    kind = rope.get("rope_type") or rope.get("type") or "default"
    rest = {k: v for k, v in rope.items() if k not in ("rope_type", "type", "rope_theta")}
    numbers = {"rope_theta": rope.get("rope_theta", 1.0)}
    if kind == "llama3":
        numbers["factor"] = rest.pop("factor", None)
        expected: dict[str, Any] = LLAMA3_SCALING
    else:
        expected = {}
    if kind not in ("default", "llama3") or rest != expected:
        yield Problem(
            "rotary scaling that is not implemented",
            f"{where}: rope_scaling",
            repr(dict(rope)),
            f"none, or llama3 with {LLAMA3_SCALING} (Megatron Core has them written in)",
        )
    for name, value in numbers.items():
        if not _positive(value):
            fields = [field for field in ("rope_parameters", "rope_scaling") if values.get(field)]
            at = ": ".join((where, *fields[:1], name))
            yield Problem("a value of another kind", at, repr(value), "a positive number")
