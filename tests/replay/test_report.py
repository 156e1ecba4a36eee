"""What a person reads of a replay, from figures made by hand."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np

import recipes
from megatron_precision.config.schema import to_dict
from megatron_precision.observe.dump import Arrays, Dump, Header
from megatron_precision.replay import report
from megatron_precision.replay.findings import PointError, Scored
from megatron_precision.replay.report import Replay

CONFIG = recipes.recipe("sanity.tiny_dense")
HALF, QUARTER = float(np.log(0.5)), float(np.log(0.25))


def dump(old_known: bool) -> Dump:
    """One sequence: a prompt of one token, a response of two, `a b`."""

    def row(*values: float) -> np.ndarray:
        return np.array([values], dtype=np.float32)

    arrays = Arrays(
        tokens=np.array([[3, 1, 2]], np.int32),
        response_mask=np.array([[False, True, True]]),
        lengths=np.array([3], np.int32),
        rollout_logprobs=row(0, HALF, QUARTER),
        old_logprobs=row(0, HALF, HALF) if old_known else row(0, 0, 0),
        old_known=np.array([old_known]),
        rewards=np.array([1], np.float32),
        advantages=np.array([0.5], np.float32),
        truncated=np.array([False]),
        weight_version=np.array([4], np.int32),
        group=np.array([0], np.int32),
    )
    header = Header(
        iteration=7, step=9, reasons=("loss/grad_norm is nan",), config=to_dict(CONFIG),
        platform={}, versions={}, metrics={}, grad_norms=("nan",), weights="",
        texts={"1": "a", "2": "\n", "3": "p"},
    )  # fmt: skip
    return Dump(Path("dumps/000007"), header, arrays)


def replay(found: Dump, forced: list[PointError] | None = None) -> Replay:
    values = np.array([[0, HALF, HALF]], np.float32)
    exact = np.array([[0, HALF, QUARTER]], np.float32)
    points = forced or []
    return Replay.of(found, CONFIG, "", Scored(values, exact, points, points))


def test_the_side_that_is_off_is_named() -> None:
    text = "\n".join(replay(dump(old_known=True)).lines())
    assert "iteration 7 of sanity.tiny_dense in fp16, weights of version 4" in text
    assert "dumped: loss/grad_norm is nan" in text
    assert "The replay's log-probs are the trainer's, bit for bit." in text
    # The engine's are FP32's: there is nothing to divide by, and nothing is said.
    assert "farther" not in text
    assert "p" + "a" + "⟦⏎⟧" in text.split("worst tokens")[1]


def test_without_the_trainers_log_probs_the_replay_stands_in() -> None:
    found = replay(dump(old_known=False))
    assert [(pair.a, pair.b) for pair in found.pairs] == [
        ("replay", "rollout"), ("rollout", "fp32"), ("replay", "fp32"),
    ]  # fmt: skip
    text = "\n".join(found.lines())
    assert "trainer" not in text.replace("trainer's", "")
    assert found.worst[0].difference == np.float32(HALF) - np.float32(QUARTER)


def test_a_layer_that_is_not_finite_is_named_and_written_as_json(tmp_path: Path) -> None:
    nan = float("nan")
    points = [PointError("layer 0", 0.1, 0.2), PointError("layer 1", nan, nan)]
    found = replay(dump(old_known=True), points)
    assert any(line.startswith("Given exact inputs, layer 1 adds") for line in found.lines())
    report.write(found, tmp_path)
    figures = json.loads((tmp_path / "replay.json").read_text())
    assert [point["mean"] for point in figures["forced"]] == [0.1, "nan"]
    assert (tmp_path / "replay.png").read_bytes().startswith(b"\x89PNG")


def test_the_router_that_flips_most_is_named() -> None:
    points = [
        PointError("layer 0", 0.1, 0.2, 0.01, 0.002),
        PointError("layer 1", 0.1, 0.2, 0.01, 0.0125),
        PointError("LM head", 0.1, 0.2),
    ]
    text = "\n".join(replay(dump(old_known=True), points).lines())
    assert "Routers: at layer 1 1.25% of the tokens go to other experts than in FP32." in text


def test_tokens_are_told_apart_by_the_engine_s_routing() -> None:
    values = np.array([[0, HALF, HALF]], np.float32)
    exact = np.array([[0, HALF, QUARTER]], np.float32)
    # The prompt's token, which predicts the first of the response, goes elsewhere in two layers.
    flipped = np.array([[2, 0, 1]], np.int32)
    scored = Scored(values, exact, [], [], [0.25, 0.5], flipped)
    found = Replay.of(dump(old_known=True), CONFIG, "", scored)
    assert [(b.low, b.high, b.tokens) for b in found.by_router_flips] == [(0, 1, 1), (2, 3, 1)]
    # The second token's trainer and engine differ by ln 2, the first one's not at all.
    means = [b.abs_mean["trainer - rollout"] for b in found.by_router_flips]
    np.testing.assert_allclose(means, [float(np.log(2)), 0.0], rtol=1e-6)
    text = "\n".join(found.lines())
    assert "Engine: at layer 1 50.00% of the tokens go to other experts than the engine's." in text
    assert "by router flips" in text
    assert replay(dump(old_known=True)).by_router_flips == []


def test_an_engine_farther_from_fp32_is_said_so() -> None:
    found = dump(old_known=True)
    off = dataclasses.replace(
        found.arrays, rollout_logprobs=np.array([[0, HALF - 0.5, QUARTER - 0.5]], np.float32)
    )
    trainer = np.array([[0, HALF, QUARTER + 0.25]], np.float32)
    off = dataclasses.replace(off, old_logprobs=trainer)
    text = "\n".join(replay(dataclasses.replace(found, arrays=off)).lines())
    # 0.5 a token against 0.125.
    assert "The engine is farther from FP32 on the same weights, 4.00 × in the mean." in text
    assert "differ from the trainer's at 1 of 2 tokens" in text
