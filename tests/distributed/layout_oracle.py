"""Names and shapes of both engines' local parameters, by hand, and a model of distinct numbers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from megatron_precision.config.schema import ModelConfig
from megatron_precision.layouts.architectures import hf_shapes
from megatron_precision.layouts.megatron import ShardCoordinates, megatron_regions
from megatron_precision.layouts.regions import Region
from megatron_precision.layouts.vllm import vllm_regions
from megatron_precision.sync.families import RolloutLayout, TrainerLayout
from megatron_precision.sync.plan import Cell

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Layout:
    """Sizes of the trainer's axes; `kv_share` engine ranks hold one KV head."""

    tp: int
    pp: int
    ep: int
    etp: int


def padded(vocab_size: int, multiple: int) -> int:
    return -(-vocab_size // multiple) * multiple


def attention_extras(model: ModelConfig, norms: Sequence[str], fused: str, rows: int) -> Shapes:
    """What some architectures have and others have not."""
    if model.model_type == "qwen2":
        return {f"{fused}.bias": (rows,)}
    if model.model_type == "llama":
        return {}
    return {f"{norm}.weight": (model.head_dim,) for norm in norms}


def megatron_shapes(model: ModelConfig, layout: Layout, pp_rank: int) -> Shapes:
    """`named_parameters()` of Megatron's GPTModel with the local layer spec, by hand."""
    hidden, d, tp = model.hidden_size, model.head_dim, layout.tp
    vocabulary = (padded(model.vocab_size, 8 * tp) // tp, hidden)
    first, last = pp_rank == 0, pp_rank == layout.pp - 1
    shapes: Shapes = {}
    if first:
        shapes["embedding.word_embeddings.weight"] = vocabulary
    for layer in range(model.num_hidden_layers // layout.pp):
        at = f"decoder.layers.{layer}"
        groups = model.num_key_value_heads // tp
        heads = model.num_attention_heads // tp
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.self_attention.linear_qkv.weight": ((heads + 2 * groups) * d, hidden),
            f"{at}.self_attention.linear_proj.weight": (hidden, heads * d),
            f"{at}.pre_mlp_layernorm.weight": (hidden,),
        }
        norms = [f"{at}.self_attention.{n}_layernorm" for n in "qk"]
        fused = f"{at}.self_attention.linear_qkv"
        shapes |= attention_extras(model, norms, fused, (heads + 2 * groups) * d)
        if not model.num_experts:
            inner = model.intermediate_size // tp
            shapes[f"{at}.mlp.linear_fc1.weight"] = (2 * inner, hidden)
            shapes[f"{at}.mlp.linear_fc2.weight"] = (hidden, inner)
            continue
        shapes[f"{at}.mlp.router.weight"] = (model.num_experts, hidden)
        inner = model.moe_intermediate_size // layout.etp
        for expert in range(model.num_experts // layout.ep):
            prefix = f"{at}.mlp.experts.local_experts.{expert}"
            shapes[f"{prefix}.linear_fc1.weight"] = (2 * inner, hidden)
            shapes[f"{prefix}.linear_fc2.weight"] = (hidden, inner)
    if last:
        shapes["decoder.final_layernorm.weight"] = (hidden,)
        # With tied embeddings a last stage that is not also the first holds a copy.
        if not model.tie_word_embeddings or not first:
            shapes["output_layer.weight"] = vocabulary
    return shapes


@functools.lru_cache(maxsize=4)
def numbered(model: ModelConfig) -> dict[str, torch.Tensor]:
    """Hugging Face tensors in which no two elements of the model are equal; to be read only."""
    tensors, offset = {}, 1
    for name, shape in hf_shapes(model).items():
        count = torch.Size(shape).numel()
        tensors[name] = torch.arange(offset, offset + count).view(shape)
        offset += count
    return tensors


def vllm_shapes(model: ModelConfig, tp: int) -> Shapes:
    """Parameters of vLLM's models in loader layout, by hand."""
    hidden, d = model.hidden_size, model.head_dim
    vocabulary = (padded(model.vocab_size, 64) // tp, hidden)
    heads, kv_heads = model.num_attention_heads // tp, max(1, model.num_key_value_heads // tp)
    shapes: Shapes = {
        "model.embed_tokens.weight": vocabulary,
        "model.norm.weight": (hidden,),
    }
    if not model.tie_word_embeddings:
        shapes["lm_head.weight"] = vocabulary
    for layer in range(model.num_hidden_layers):
        at = f"model.layers.{layer}"
        shapes |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
            f"{at}.self_attn.qkv_proj.weight": ((heads + 2 * kv_heads) * d, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, heads * d),
        }
        norms = [f"{at}.self_attn.{n}_norm" for n in "qk"]
        rows = (heads + 2 * kv_heads) * d
        shapes |= attention_extras(model, norms, f"{at}.self_attn.qkv_proj", rows)
        if model.num_experts:
            inner = model.moe_intermediate_size // tp
            experts = f"{at}.mlp.experts.routed_experts"
            shapes[f"{at}.mlp.gate.weight"] = (model.num_experts, hidden)
            shapes[f"{experts}.w13_weight"] = (model.num_experts, 2 * inner, hidden)
            shapes[f"{experts}.w2_weight"] = (model.num_experts, hidden, inner)
        else:
            inner = model.intermediate_size // tp
            shapes[f"{at}.mlp.gate_up_proj.weight"] = (2 * inner, hidden)
            shapes[f"{at}.mlp.down_proj.weight"] = (hidden, inner)
    return shapes


DENSE = ModelConfig(
    vocab_size=37, hidden_size=6, intermediate_size=24, num_hidden_layers=4,
    num_attention_heads=16, num_key_value_heads=4, head_dim=2,
)  # fmt: skip
MODELS = {
    "dense": DENSE,
    "tied": dataclasses.replace(DENSE, tie_word_embeddings=True),
    "qwen2": dataclasses.replace(DENSE, model_type="qwen2", num_key_value_heads=8),
    "MoE": dataclasses.replace(
        DENSE, model_type="qwen3_moe", num_experts=8, num_experts_per_tok=2,
        moe_intermediate_size=8,
    ),
}  # fmt: skip
# Of worlds that are no power of two: vLLM pads this vocabulary to 3 × 64 rows.
_THREES = ModelConfig(
    vocab_size=150, hidden_size=5, intermediate_size=24, num_hidden_layers=6,
    num_attention_heads=12, num_key_value_heads=6, head_dim=2,
)  # fmt: skip
THREES = {
    "dense of threes": _THREES,
    "MoE of threes": dataclasses.replace(
        _THREES, model_type="qwen3_moe", num_experts=6, num_experts_per_tok=2,
        moe_intermediate_size=12,
    ),
}  # fmt: skip


@dataclass
class RankTensors:
    """Parameters of one rank's side, and how often each element was written."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    written: dict[str, torch.Tensor] = field(default_factory=dict)
    regions: list[Region] = field(default_factory=list)

    @functools.cached_property
    def _by_tensor(self) -> dict[str, list[Region]]:
        found: dict[str, list[Region]] = {}
        for region in self.regions:
            found.setdefault(region.hf_name, []).append(region)
        return found

    def view(self, cell: Cell, of: dict[str, torch.Tensor]) -> torch.Tensor:
        """The strided view of a cell in the one region that holds it."""
        for region in self._by_tensor.get(cell.hf_name, ()):
            if region.holds(cell.start, cell.shape):
                return of[region.parameter].view(region.view)[region.within(cell.start, cell.shape)]
        raise AssertionError(f"{cell} is not held")


def trainer_rank(model: ModelConfig, layout: TrainerLayout, rank: int) -> RankTensors:
    """Megatron's order: tensor parallel fastest, then expert, data and pipeline parallel."""
    rank -= layout.first
    per_stage = layout.size // layout.pp
    stage, within = divmod(rank, per_stage)
    at = ShardCoordinates(
        tp_rank=within % layout.tp,
        tp_size=layout.tp,
        etp_rank=within % layout.etp,
        etp_size=layout.etp,
        first_expert=within // layout.etp % layout.ep * (model.num_experts // layout.ep),
        first_layer=stage * (model.num_hidden_layers // layout.pp),
    )
    held, source = RankTensors(), numbered(model)
    shapes = megatron_shapes(model, Layout(layout.tp, layout.pp, layout.ep, layout.etp), stage)
    for name, shape in shapes.items():
        local = torch.full(shape, -1)
        for region in megatron_regions(name, shape, model, at):
            view = local.view(region.view)[region.spans]
            view.copy_(source[region.hf_name][region.box].reshape(view.shape))
            if name != "output_layer.weight" or not model.tie_word_embeddings:
                held.regions.append(region)
        held.tensors[name] = local
    return held


def engine_rank(model: ModelConfig, layout: RolloutLayout, rank: int) -> RankTensors:
    """An engine's parameters before the sync; experts whole and consecutive under EP."""
    position = (rank - layout.first) % layout.tp
    at = ShardCoordinates(position, layout.tp, position, layout.tp)
    local = model
    if layout.expert_parallel and model.num_experts:
        count = model.num_experts // layout.tp
        at = ShardCoordinates(position, layout.tp, 0, 1, first_expert=position * count)
        local = dataclasses.replace(model, num_experts=count)
    held = RankTensors()
    for name, shape in vllm_shapes(local, layout.tp).items():
        if at.etp_size == 1 and local is not model:
            inner = model.moe_intermediate_size
            if name.endswith("w13_weight"):
                shape = (local.num_experts, 2 * inner, model.hidden_size)
            elif name.endswith("w2_weight"):
                shape = (local.num_experts, model.hidden_size, inner)
            elif name.endswith("mlp.gate.weight"):
                shape = (model.num_experts, model.hidden_size)
        held.regions += vllm_regions(name, shape, model, at)
        held.tensors[name] = torch.zeros(shape, dtype=torch.int64)
        held.written[name] = torch.zeros(shape, dtype=torch.int64)
    return held
