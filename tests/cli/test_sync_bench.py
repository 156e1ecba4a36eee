"""`sync-bench`: bytes by hand, and mistakes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megatron_precision.cli.main import main
from megatron_precision.cli.sync_bench import model_of, planner_of
from megatron_precision.preflight.sync import sized
from megatron_precision.sync.traffic import traffic

SHARED = ["sync-bench", "--model", "qwen3-14b"]


def test_tp2_to_two_replicas_moves_half_of_every_divided_tensor() -> None:
    """Each rank has one half of what tensor parallelism divides, and all norms; it lacks a half."""
    planner = planner_of(model_of("qwen3-14b"), "tp=2", "tp=1,dp=2", 2, 8, apart=False)
    found = traffic(planner, 2, 2**26)
    hidden, inner, layers, q, kv, vocabulary = 5120, 17408, 40, 5120, 1024, 151936
    norms = layers * (2 * hidden + 2 * 128) + hidden
    divided = layers * ((2 * q + 2 * kv) * hidden + 3 * inner * hidden) + 2 * vocabulary * hidden
    assert found.model_bytes == 2 * (norms + divided)
    for rank in found.ranks:
        assert rank.received == rank.received_bound == rank.sent == divided
        assert rank.copied == divided + 2 * norms
        assert rank.from_network == rank.to_network == 0
        assert rank.peers == 1
        # Halves in messages of at most 16 Mi elements, each way: q (13 Mi), k, v and o one each,
        # the MLP's three (43 Mi) three each, embedding and head (371 Mi) 24 each.
        assert rank.messages == 2 * (layers * (4 + 3 * 3) + 2 * 24)


def test_a_node_takes_each_byte_once_and_hands_it_on() -> None:
    """One trainer on a node, four one-rank engines on another: a quarter of it enters by each."""
    planner = planner_of(model_of("qwen3-30b-a3b"), "tp=1", "tp=1,dp=4", None, 4, apart=True)
    found = traffic(planner, 2, 2**26)
    engines = [rank for rank in found.ranks if rank.received]
    assert [rank.rank for rank in engines] == [1, 2, 3, 4]
    assert all(rank.received == rank.received_bound == found.model_bytes for rank in engines)
    # Ranks 1 to 3 share the trainer's node; rank 4 is alone on the next.
    assert found.network[1] == (found.model_bytes, found.model_bytes)
    assert found.network[0] == (0, 0)


def test_it_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*SHARED, "--train", "tp=8", "--rollout", "tp=2,dp=4", "--world", "8"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "27.51 GiB of weights, 8 ranks" in shown
    assert "received ÷ lower bound, all ranks    1.000" in shown
    assert main([*words, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert len(values["ranks"]) == 8
    # The links alone: the busier way of rank 0 at 450 GB/s.
    first = values["ranks"][0]
    busier = max(first["received"], first["sent"])
    assert values["seconds"]["0"] == pytest.approx(busier / 450e9)


def test_trainers_and_engines_that_are_apart_are_two_means(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A trainer on a node of its own, and two engines of one rank on another: one hands on."""
    words = [*SHARED, "--layers", "1", "--train", "tp=1", "--rollout", "tp=1,dp=2", "--apart"]
    assert main([*words, "--ranks-per-node", "1", "--batch-mib", "1"]) == 0
    shown = capsys.readouterr().out
    # Two nodes of one rank: the trainer sends everything twice, and nothing is handed on.
    assert "sent by the busiest trainer ÷ mean   1.000" in shown
    assert "handed on" not in shown
    assert main([*words, "--train", "tp=1,dp=2", "--ranks-per-node", "2"]) == 0
    shown = capsys.readouterr().out
    # Each engine takes half of it from the network, and gives it to the other.
    assert "sent by the busiest trainer ÷ mean   1.0" in shown
    assert "handed on by an engine ÷ mean        1.0" in shown


def test_a_small_model_is_not_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = {
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 512,
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    words = ["sync-bench", "--model", str(tmp_path), "--train", "tp=2", "--rollout", "tp=1,dp=2"]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "KiB of weights" in shown
    assert "GiB" not in shown
    assert sized(0) == "0.00 KiB"
    assert sized(3 * 2**20) == "3.00 MiB"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([*SHARED[1:], "--nic", "nan", "--nvlink", "inf", "--batch-mib", "99999"],
         ["3 problems", "1 to 8192"]),
        ([*SHARED[1:], "--train", "tp=2,tp=4", "--rollout", ""], ["given twice", "nothing"]),
        ([*SHARED[1:], "--world", "100000000"], ["--world", "1 to 65536"]),
        ([*SHARED[1:], "--layers", "41", "--vocab-rows", "999999"], ["2 problems", "40", "151936"]),
        (["--model", "qwen3-14"], ["unknown model", "did you mean qwen3-14b?"]),
        # Numbers, model and sizes at once.
        (
            ["--model", "qwen3-14", "--nic", "nan", "--layers", "0", "--train", "tq=2"],
            ["4 problems", "--nic", "--layers", "did you mean qwen3-14b?", "tq=2"],
        ),
        (
            [*SHARED[1:], "--nvlink", "inf", "--rollout", "tp=3"],
            ["--nvlink", "attention heads do not divide", "rows of the vocabulary do not divide"],
        ),
        ([*SHARED[1:], "--train", "tq=2,tp=0"], ["2 problems", "tq=2", "tp=0"]),
        (
            [*SHARED[1:], "--train", "tp=16,pp=3,ep=2", "--rollout", "tp=3", "--world", "16"],
            ["KV heads do not divide", "layers do not divide", "has no experts", "--rollout tp"],
        ),
        ([*SHARED[1:], "--train", "tp=2", "--rollout", "tp=1,dp=4"], ["--apart"]),
        ([*SHARED[1:], "--rollout", "tp=8,ep=8", "--world", "8"], ["1 for a dense model"]),
        (
            [*SHARED[1:], "--train", "dp=4", "--world", "8"],
            ["sizes that make another world", "--train"],
        ),
        (
            [*SHARED[1:], "--world", "-4", "--ranks-per-node", "0", "--batch-mib", "0",
             "--nvlink", "0"],
            ["4 problems", "--ranks-per-node", "--batch-mib", "--nvlink"],
        ),
    ],
)  # fmt: skip
def test_every_mistake_is_listed(
    words: list[str], expected: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sync-bench", *words]) == 2
    error = capsys.readouterr().err
    for text in expected:
        assert text in error
