"""Where Hugging Face tensors lie in Megatron and in vLLM: covered once, and there and back.

Layouts and sizes are random. The names and shapes of local parameters are listed here by hand;
that they are the engines' own is proven by the tests that run the engines.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_precision.config.schema import ModelConfig
from megatron_precision.layouts.architectures import hf_shapes
from megatron_precision.layouts.megatron import ShardCoordinates, megatron_regions
from megatron_precision.layouts.regions import Region, uncovered
from megatron_precision.layouts.vllm import vllm_regions
from tests.distributed.layout_oracle import Layout, Shapes, megatron_shapes, numbered, vllm_shapes

DENSE = ("qwen3", "qwen2", "llama")


@st.composite
def trainers(draw: st.DrawFn) -> tuple[ModelConfig, Layout]:
    """A model that its layout divides, and no more than that."""
    tp, pp, ep, etp = (draw(st.sampled_from([1, 2, 3])) for _ in range(4))
    groups, per_group = tp * draw(st.integers(1, 3)), draw(st.integers(1, 3))
    moe = draw(st.booleans())
    model = ModelConfig(
        model_type="qwen3_moe" if moe else draw(st.sampled_from(DENSE)),
        vocab_size=draw(st.integers(3, 60)),
        hidden_size=draw(st.integers(2, 7)),
        intermediate_size=tp * draw(st.integers(1, 5)),
        num_hidden_layers=pp * draw(st.integers(1, 2)),
        num_attention_heads=groups * per_group,
        num_key_value_heads=groups,
        head_dim=draw(st.sampled_from([2, 4])),
        tie_word_embeddings=draw(st.booleans()),
        num_experts=ep * draw(st.integers(1, 3)) if moe else 0,
        num_experts_per_tok=1 if moe else 0,
        moe_intermediate_size=etp * draw(st.integers(1, 4)) if moe else 0,
    )
    return model, Layout(tp, pp, ep, etp)


def in_transformer_engines_names(shapes: Shapes) -> Shapes:
    """The same parameters as Transformer Engine's layer spec names them, by hand."""
    named: Shapes = {}
    for name, shape in shapes.items():
        moe = any(".mlp.router." in other for other in shapes)
        name = name.replace("input_layernorm.", "self_attention.linear_qkv.layer_norm_")
        if not moe:
            name = name.replace("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_")
        name = re.sub(r"local_experts\.(\d+)\.(linear_fc\d)\.weight", r"\2.weight\1", name)
        named[name] = shape
    return named


def trainer_ranks(model: ModelConfig, layout: Layout) -> Iterator[tuple[Shapes, ShardCoordinates]]:
    """Every rank that differs: dense coordinates and expert coordinates are independent."""
    for pp_rank in range(layout.pp):
        shapes = megatron_shapes(model, layout, pp_rank)
        for tp_rank in range(layout.tp):
            for ep_rank in range(layout.ep):
                for etp_rank in range(layout.etp):
                    yield (
                        shapes,
                        ShardCoordinates(
                            tp_rank=tp_rank,
                            tp_size=layout.tp,
                            etp_rank=etp_rank,
                            etp_size=layout.etp,
                            first_expert=ep_rank * (model.num_experts // layout.ep),
                            first_layer=pp_rank * (model.num_hidden_layers // layout.pp),
                        ),
                    )


Table = Callable[[str, tuple[int, ...], ModelConfig, ShardCoordinates], list[Region]]
Ranks = list[tuple[Shapes, ShardCoordinates]]


def assert_covered_once(table: Table, model: ModelConfig, ranks: Ranks) -> None:
    """Distinct boxes of all ranks tile every tensor: no gap, no overlap but whole replicas."""
    regions = [p for shapes, at in ranks for n, s in shapes.items() for p in table(n, s, model, at)]
    painted = {name: torch.zeros(shape) for name, shape in hf_shapes(model).items()}
    for hf_name, start, shape in {(p.hf_name, p.start, p.shape) for p in regions}:
        area = tuple(slice(a, a + n) for a, n in zip(start, shape, strict=True))
        assert painted[hf_name][area].shape == shape, f"{hf_name}: a box beyond the tensor"
        painted[hf_name][area] += 1
    assert {name for name, count in painted.items() if not (count == 1).all()} == set()
    assert uncovered(regions, hf_shapes(model)) == []


def assert_round_trip(table: Table, model: ModelConfig, ranks: Ranks) -> None:
    """Hugging Face tensors, scattered to every rank's parameters, come back as they were."""
    source = numbered(model)
    back = {name: torch.zeros_like(tensor) for name, tensor in source.items()}
    for shapes, at in ranks:
        for name, shape in shapes.items():
            local = torch.zeros(shape, dtype=torch.int64)
            written = torch.zeros(shape, dtype=torch.int64)
            for region in table(name, shape, model, at):
                view = local.view(region.view)[region.spans]
                view.copy_(source[region.hf_name][region.box].reshape(view.shape))
                written.view(region.view)[region.spans] += 1
            # Only padded rows of the vocabulary may stay unwritten, nothing is written twice.
            assert written.max() <= 1
            if "embed" not in name and name not in ("output_layer.weight", "lm_head.weight"):
                assert (written == 1).all(), name
            for region in table(name, shape, model, at):
                values = local.view(region.view)[region.spans].reshape(region.shape)
                back[region.hf_name][region.box] = values
    for name, tensor in source.items():
        assert torch.equal(back[name], tensor), name


@given(trainers())
@settings(max_examples=40, deadline=None)
def test_megatron_regions_cover_every_tensor_exactly_once(made: tuple[ModelConfig, Layout]) -> None:
    assert_covered_once(megatron_regions, made[0], list(trainer_ranks(*made)))


@given(trainers())
@settings(max_examples=20, deadline=None)
def test_megatron_regions_scatter_and_gather_to_the_identity(
    made: tuple[ModelConfig, Layout],
) -> None:
    assert_round_trip(megatron_regions, made[0], list(trainer_ranks(*made)))


@given(trainers())
@settings(max_examples=20, deadline=None)
def test_transformer_engines_names_hold_the_same_regions(made: tuple[ModelConfig, Layout]) -> None:
    ranks = [(in_transformer_engines_names(shapes), at) for shapes, at in trainer_ranks(*made)]
    assert_covered_once(megatron_regions, made[0], ranks)
    assert_round_trip(megatron_regions, made[0], ranks)


@st.composite
def engines(draw: st.DrawFn) -> tuple[ModelConfig, int]:
    """A model and an engine's tensor-parallel size; ranks may outnumber KV heads."""
    tp = draw(st.sampled_from([1, 2, 4]))
    kv_heads = draw(st.sampled_from([1, 2, 3, 4, 6]).filter(lambda n: n % tp == 0 or tp % n == 0))
    per_group = draw(st.integers(1, 3).filter(lambda n: kv_heads * n % tp == 0))
    moe = draw(st.booleans())
    model = ModelConfig(
        model_type="qwen3_moe" if moe else draw(st.sampled_from(DENSE)),
        vocab_size=draw(st.integers(3, 150)),
        hidden_size=draw(st.integers(2, 7)),
        intermediate_size=tp * draw(st.integers(1, 5)),
        num_hidden_layers=draw(st.integers(1, 2)),
        num_attention_heads=kv_heads * per_group,
        num_key_value_heads=kv_heads,
        head_dim=draw(st.sampled_from([2, 4])),
        tie_word_embeddings=draw(st.booleans()),
        num_experts=draw(st.integers(1, 4)) if moe else 0,
        num_experts_per_tok=1 if moe else 0,
        moe_intermediate_size=tp * draw(st.integers(1, 4)) if moe else 0,
    )
    return model, tp


def engine_ranks(model: ModelConfig, tp: int) -> Ranks:
    shapes = vllm_shapes(model, tp)
    return [
        (shapes, ShardCoordinates(tp_rank=rank, tp_size=tp, etp_rank=rank, etp_size=tp))
        for rank in range(tp)
    ]


@given(engines())
@settings(max_examples=40, deadline=None)
def test_vllm_regions_cover_every_tensor_exactly_once(made: tuple[ModelConfig, int]) -> None:
    assert_covered_once(vllm_regions, made[0], engine_ranks(*made))


@given(engines())
@settings(max_examples=20, deadline=None)
def test_vllm_regions_scatter_and_gather_to_the_identity(made: tuple[ModelConfig, int]) -> None:
    assert_round_trip(vllm_regions, made[0], engine_ranks(*made))


def test_megatron_interleaves_queries_keys_and_values_per_group() -> None:
    model = ModelConfig(
        hidden_size=3, num_attention_heads=8, num_key_value_heads=4, head_dim=2, vocab_size=5
    )
    q, k, v = (torch.arange(n * 2 * 3).view(n * 2, 3) + s for n, s in ((8, 0), (4, 100), (4, 200)))
    # Rank 1 of 2 holds groups 2 and 3: queries 4 5, key 2, value 2, queries 6 7, key 3, value 3.
    by_hand = torch.cat([q[8:12], k[4:6], v[4:6], q[12:16], k[6:8], v[6:8]])
    source = {
        f"model.layers.0.self_attn.{n}_proj.weight": t
        for n, t in zip("qkv", (q, k, v), strict=True)
    }
    local = torch.zeros(16, 3, dtype=torch.int64)
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    at = ShardCoordinates(tp_rank=1, tp_size=2)
    for region in megatron_regions(name, (16, 3), model, at):
        view = local.view(region.view)[region.spans]
        view.copy_(source[region.hf_name][region.box].reshape(view.shape))
    assert torch.equal(local, by_hand)


def test_engine_ranks_that_outnumber_kv_heads_hold_the_same_head() -> None:
    model = ModelConfig(hidden_size=3, num_attention_heads=8, num_key_value_heads=2, head_dim=2)
    held = {}
    for rank in range(4):
        at = ShardCoordinates(tp_rank=rank, tp_size=4)
        regions = vllm_regions("model.layers.0.self_attn.qkv_proj.weight", (8, 3), model, at)
        held[rank] = {region.hf_name.split(".")[-2]: region.start[0] for region in regions}
    # Two queries a rank, four rows; two rows a KV head, each on two neighbouring ranks.
    assert [held[rank]["q_proj"] for rank in range(4)] == [0, 4, 8, 12]
    assert [held[rank]["k_proj"] for rank in range(4)] == [0, 0, 2, 2]
    assert [held[rank]["v_proj"] for rank in range(4)] == [0, 0, 2, 2]


@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.self_attention.linear_qkv.bias",
        "decoder.layers.0.mlp.linear_fc3.weight",
        "decoder.layers.x.mlp.linear_fc1.weight",
        "decoder.layers.0.mlp.experts.weight1",
        "position_embeddings.weight",
    ],
)
def test_an_unknown_megatron_parameter_raises(name: str) -> None:
    with pytest.raises(ValueError, match="unknown Megatron parameter"):
        megatron_regions(name, (4, 4), ModelConfig(), ShardCoordinates())


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.qkv_proj.bias", "model.layers.0.mlp.experts.w4_weight"]
)
def test_an_unknown_vllm_parameter_raises(name: str) -> None:
    with pytest.raises(ValueError, match="unknown vLLM parameter"):
        vllm_regions(name, (4, 4), ModelConfig(), ShardCoordinates())


def test_what_no_rank_holds_is_named_with_its_size() -> None:
    model, layout = ModelConfig(num_hidden_layers=2), Layout(2, 1, 1, 1)
    ranks = list(trainer_ranks(model, layout))
    regions = [
        region
        for shapes, at in ranks[:1]
        for name, shape in shapes.items()
        for region in megatron_regions(name, shape, model, at)
    ]
    problems = uncovered(regions, hf_shapes(model))
    assert "model.layers.1.self_attn.o_proj.weight: 8192 of 16384 elements covered" in problems
    assert not any("layernorm" in problem for problem in problems)
    stranger = Region("model.extra", (0,), (2,), "extra", (2,), ((0, 2),))
    assert "model.extra: not a tensor of this model" in uncovered([stranger], hf_shapes(model))


def test_a_view_that_cannot_hold_its_box_is_refused() -> None:
    with pytest.raises(ValueError, match="a view of 4 elements cannot hold a box of 6"):
        Region("t", (0, 0), (2, 3), "p", (4,), ((0, 4),))
