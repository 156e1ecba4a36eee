"""Checkpoints of real trainers on two ranks: through every layout and back, bit for bit.

Tiny models in FP16, dense with tied embeddings (a copy on the last pipeline stage) and MoE. With
data parallelism the optimizer's ranges are cut in the middle of rows. Not covered: Transformer
Engine's optimizer, and more than two ranks.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from megatron_precision.config.schema import (
    LossScaleConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
    TrainConfig,
)
from megatron_precision.layouts.hf_config import hf_config
from tests.distributed.cases import Case
from tests.distributed.harness import run_distributed
from tests.distributed.oracle import DENSE, MOE, checkpoint, random_batch, random_hf_model

TIED = dataclasses.replace(DENSE, tie_word_embeddings=True)
TP2, DP2, PP2 = ParallelConfig(2, 2), ParallelConfig(2, 1), ParallelConfig(2, 1, 2)
EP2 = ParallelConfig(2, 1, 1, 2)
# Megatron's MoE layer trains with tensor parallelism where sequences are divided too.
MOE_TP2 = ParallelConfig(2, 2, 1, 1, 2, sequence_parallel=True)
MODELS = {"tied": (TIED, [TP2, DP2, PP2]), "MoE": (MOE, [EP2, MOE_TP2, DP2, PP2])}


def case(model: ModelConfig, parallel: ParallelConfig = TP2) -> Case:
    config = RunConfig(
        "test",
        precision="fp16",
        model=model,
        parallel=parallel,
        optimizer=OptimizerConfig(learning_rate=1e-2, eps=1e-8, weight_decay=0.1),
        loss_scale=LossScaleConfig("fixed_start", initial_scale=64.0),
        train=TrainConfig(micro_batch_size=2),
    )
    return Case(config, checkpoint(model, random_hf_model(model, 0.2)), random_batch(model, 6))


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("found")
    (folder / "config.json").write_text(json.dumps(hf_config(TIED, "float32")))
    body = "resume_bodies.damage_and_generators"
    return run_distributed(body, 2, case(TIED), str(folder), str(folder))


@pytest.fixture(scope="module", params=["tied", pytest.param("MoE", marks=pytest.mark.slow)])
def way(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    model, layouts = MODELS[request.param]
    folder = tmp_path_factory.mktemp("way")
    (folder / "config.json").write_text(json.dumps(hf_config(model, "float32")))
    body = "resume_bodies.through_layouts"
    return run_distributed(body, 2, case(model), str(folder), layouts, str(folder))


def test_parameters_main_copies_and_moments_come_back_bit_for_bit(way: Any) -> None:
    assert way["held"] == ["exp_avg", "exp_avg_sq", "param"]
    assert way["differing"] == []
    assert way["applied"] == 3


def test_every_layout_takes_the_next_step_as_the_first_would_have(way: Any) -> None:
    for layout, weights in way["stepped"].items():
        for name, values in weights.items():
            # A step of 1e-2: what rounds otherwise is a thousandth of it.
            torch.testing.assert_close(
                values.float(), way["straight"][name].float(), atol=2e-3, rtol=2e-3, msg=layout
            )


def test_one_flipped_bit_of_any_file_is_noticed(found: Any) -> None:
    damage = found["damage"]
    assert damage.pop("as written") == []
    assert {".metadata", "metadata.json", "common.pt", "conversion_manifest.json"} <= set(damage)
    assert any(name.startswith("__1_") for name in damage)
    for name, problems in damage.items():
        assert problems, f"{name} may be damaged and nobody sees it"


def test_generators_of_every_rank_go_on_where_they_stood(found: Any) -> None:
    ranks = found["draws"]
    assert [before == after for before, after in ranks] == [True, True]
    assert ranks[0][0] != ranks[1][0]
