"""Times against numbers worked by hand at round rates."""

from __future__ import annotations

import dataclasses

import pytest

import recipes
from megatron_precision.config.schema import ParallelConfig, RunConfig
from megatron_precision.preflight import estimate, memory, wire, work
from megatron_precision.preflight.estimate import Estimate, Rates
from megatron_precision.preflight.work import Lengths

RATES = Rates(1e15, 0.5, 2e12, 0.5, 250e-6, 400e9, 40e9)
LENGTHS = Lengths(500, 5_000)


def estimated(config: RunConfig, rates: Rates = RATES, lengths: Lengths = LENGTHS) -> Estimate:
    done = work.of_iteration(config, lengths, 1)
    return estimate.of_iteration(config, lengths, done, wire.of_run(config, 8), rates, 8)


def test_a_decoding_step_reads_weights_and_cache_and_launches_layers() -> None:
    config = recipes.build("dense14b.dapo")
    # Of 1,846,410,240 weights the embedding's 151,936 / 8 × 5,120 are looked up; 20,480 bytes of
    # keys and values a token; 40 layers of 0.25 ms.
    read = 2 * (1_846_410_240 - 18_992 * 5_120) + 64 * 3_000 * 20_480
    assert memory.engine_elements(config) == 1_846_410_240
    expected = read / 1e12 + 0.010
    assert estimate.decode_step_s(config, 64, 3_000, RATES) == pytest.approx(expected)


def test_few_tokens_read_the_experts_that_they_are_sent_to() -> None:
    config = recipes.build("moe.grpo_seq_mis")
    still = dataclasses.replace(RATES, layer_launch_s=0.0)
    one, many = (estimate.decode_step_s(config, n, 0, still) for n in (1, 256))
    # One rank of eight has 48 × 128 × 3 × 2,048 × 96 of the experts; one token is sent to 8 of 128.
    experts = 48 * 128 * 3 * 2_048 * 96
    assert many - one == pytest.approx(2 * experts * (1 - 8 / 128) / 1e12, rel=1e-4)


def test_what_bounds_the_sequences_of_an_engine() -> None:
    config = recipes.build("dense14b.dapo")
    assert estimated(config).decoding_limit == "rollout.max_num_seqs"
    # 16 GiB of 20,480 bytes a token are 838,860 tokens: 37 of 2,048 + 20,480, 68 at the half.
    full = estimated(config, lengths=Lengths(2_048, 20_480))
    assert (full.decoding, full.decoding_limit) == (68, "the KV cache")
    wide = dataclasses.replace(config, parallel=ParallelConfig(1024, 8, 1, 1, 1, True, 8))
    found = estimated(wide)
    assert (found.decoding, found.decoding_limit) == (4 * 16, "the requests")
    assert found.longest_alone
    alone = 20_480 * estimate.decode_step_s(wide, 1, 500 + 10_240, RATES)
    assert found.rollout_s == pytest.approx(alone)


def test_training_takes_its_operations_at_the_rate_and_the_bubble() -> None:
    config = recipes.build("moe.grpo_seq_mis")  # 32 GPUs, PP 4, DP 2
    done = work.of_iteration(config, LENGTHS, 1)
    # 256 sequences a rank; four of 5,500 tokens under the budget of 22,528.
    assert estimate.micro_batches(config, LENGTHS) == 64
    train = dataclasses.replace(config.train, packed_sequences=True)
    # End to end they fill it: 256 x 5,500 / 22,528 = 62.5.
    assert estimate.micro_batches(dataclasses.replace(config, train=train), LENGTHS) == 63
    flops = done.training_flops + done.recomputed_flops
    expected = flops / (32 * 0.5e15) * (3 + 64) / 64
    assert estimated(config).training_s == pytest.approx(expected)


def test_gradients_and_parameters_cross_the_link_that_their_group_spans() -> None:
    config = recipes.build("dense14b.dapo", overrides=["parallel.world_size=32"])  # TP 8, DP 4
    held = memory.trainer_elements(config, 0).dense
    expected = 16 * held * (4 + 2) * 3 / 4 / 40e9
    assert estimated(config).exchange_s == pytest.approx(expected)
    # TP 1 × DP 8 stay in their node.
    inside = dataclasses.replace(config, parallel=ParallelConfig(8, 1, rollout_tp_size=8))
    held = memory.trainer_elements(inside, 0).dense
    assert estimated(inside).exchange_s == pytest.approx(16 * held * 6 * 7 / 8 / 400e9)


def test_a_sync_takes_the_links_of_the_busiest_rank() -> None:
    config = recipes.build("moe.grpo_seq_mis")
    moved = wire.of_run(config, 8)
    nic = moved.node_network / 8
    expected = (moved.rank_received - nic) / 400e9 + nic / 40e9
    assert estimated(config).sync_s == pytest.approx(expected)


def test_gpu_hours_are_all_phases_on_all_gpus() -> None:
    found = estimated(recipes.build("moe.grpo_seq_mis"))
    phases = (
        found.rollout_s + found.old_logprobs_s + found.training_s + found.exchange_s + found.sync_s
    )
    assert found.iteration_s == pytest.approx(phases)
    assert found.gpu_hours == pytest.approx(phases * 32 / 3600)


@pytest.mark.parametrize("faster", ["flops", "mfu", "hbm", "hbm_share", "nvlink", "nic"])
def test_a_higher_rate_takes_no_longer(faster: str) -> None:
    config = recipes.build("moe.grpo_seq_mis")
    better = dataclasses.replace(RATES, **{faster: 1.5 * getattr(RATES, faster)})
    assert estimated(config, better).iteration_s < estimated(config).iteration_s
