"""The trainer's log-probs, loss, gradients and step against transformers with autograd, in FP32.

Not covered: layouts of more than two ranks (context, expert tensor parallelism, PP with TP).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from megatron_precision.config.schema import (
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TrainConfig,
)
from tests.distributed.cases import Case
from tests.distributed.harness import run_distributed
from tests.distributed.oracle import (
    DENSE,
    MOE,
    Expected,
    checkpoint,
    expected,
    random_batch,
    random_hf_model,
)

TIED = dataclasses.replace(DENSE, tie_word_embeddings=True)
UNNORMALISED = dataclasses.replace(MOE, norm_topk_prob=False)
# A large epsilon, so that the step is a smooth function of the gradient.
ADAM = OptimizerConfig(learning_rate=1e-2, eps=1e-2, weight_decay=0.1, clip_grad=1.0)
RELATIVE = 2e-5

ONE = ParallelConfig(1, 1, rollout_tp_size=1)
TP2 = ParallelConfig(2, 2)
TP2_SP = ParallelConfig(2, 2, sequence_parallel=True)
PP2 = ParallelConfig(2, 1, 2)
DP2 = ParallelConfig(2, 1)
EP2 = ParallelConfig(2, 1, 1, 2)
TP2_EP2_SP = ParallelConfig(2, 2, 1, 2, sequence_parallel=True)
TP2_ETP2_SP = ParallelConfig(2, 2, 1, 1, 2, sequence_parallel=True)

QWEN2 = dataclasses.replace(DENSE, model_type="qwen2")
# A base that is large enough for Llama 3's scaling to reach some of the frequencies.
LLAMA = dataclasses.replace(TIED, model_type="llama", rope_theta=500000.0, rope_scaling_factor=8.0)

# Sequences of 8 to 16 tokens: micro-batches differ in width and in number of sequences.
TOKENS = TrainConfig(micro_batch_tokens=35)
# End to end in one row. FP32 rows are padded to a multiple of TP: one token, or none.
PACKED = TrainConfig(micro_batch_tokens=35, packed_sequences=True)
PACKED_3 = TrainConfig(micro_batch_size=3, packed_sequences=True)

# name: (model, layout, sequences, micro-batch size or what is trained by, temperature)
Layout = tuple[ModelConfig, ParallelConfig, int, int | TrainConfig, float]
ONE_RANK: dict[str, Layout] = {
    "dense": (DENSE, ONE, 6, 2, 1.0),
    "dense, 7 sequences in micro-batches of 3": (DENSE, ONE, 7, 3, 1.0),
    "dense, tied embeddings": (TIED, ONE, 6, 6, 1.0),
    "dense, temperature 0.7": (DENSE, ONE, 6, 2, 0.7),
    "MoE": (MOE, ONE, 7, 3, 1.0),
    "dense, end to end": (DENSE, ONE, 7, PACKED_3, 0.7),
    "MoE, end to end": (MOE, ONE, 7, PACKED, 1.0),
    "MoE, router weights not renormalised": (UNNORMALISED, ONE, 6, 2, 1.0),
}
TWO_RANKS: dict[str, Layout] = {
    "dense TP2": (DENSE, TP2, 6, 2, 1.0),
    "dense TP2 SP": (DENSE, TP2_SP, 7, 3, 1.0),
    "dense TP2 SP, tied embeddings": (TIED, TP2_SP, 6, 4, 0.7),
    "dense PP2": (DENSE, PP2, 7, 3, 1.0),
    "dense PP2, tied embeddings": (TIED, PP2, 6, 2, 1.0),
    "dense DP2, uneven micro-batches": (DENSE, DP2, 10, 3, 1.0),
    "dense DP2, packed by tokens": (DENSE, DP2, 10, TOKENS, 1.0),
    "dense PP2, packed by tokens": (DENSE, PP2, 9, TOKENS, 1.0),
    "MoE EP2, packed by tokens": (MOE, EP2, 10, TOKENS, 1.0),
    "dense DP2, end to end": (DENSE, DP2, 10, PACKED, 1.0),
    "dense PP2, end to end": (DENSE, PP2, 9, PACKED, 1.0),
    "Llama TP2 SP, tied embeddings, end to end": (LLAMA, TP2_SP, 7, PACKED_3, 1.0),
    "MoE TP2 EP2 SP, end to end": (MOE, TP2_EP2_SP, 7, PACKED_3, 1.0),
    "Qwen2 TP2": (QWEN2, TP2, 6, 2, 1.0),
    "Llama TP2 SP, tied embeddings": (LLAMA, TP2_SP, 6, 2, 1.0),
    "MoE EP2": (MOE, EP2, 10, 3, 1.0),
    "MoE TP2 EP2 SP": (MOE, TP2_EP2_SP, 6, 2, 1.0),
    "MoE TP2 ETP2 SP": (MOE, TP2_ETP2_SP, 6, 2, 1.0),
    "MoE PP2": (MOE, PP2, 6, 2, 1.0),
}


def case(layout: Layout) -> tuple[Case, Expected, dict[str, torch.Tensor]]:
    model, parallel, sequences, micro_batches, temperature = layout
    train = (
        TrainConfig(micro_batch_size=micro_batches)
        if isinstance(micro_batches, int)
        else micro_batches
    )
    built = random_hf_model(model)
    batch = random_batch(model, sequences)
    tensors = checkpoint(model, built)
    config = RunConfig(
        "test",
        precision="fp32",
        model=model,
        parallel=parallel,
        optimizer=ADAM,
        train=train,
        rollout=RolloutConfig(temperature=temperature),
    )
    oracle = expected(model, built, batch, temperature)
    return Case(config, tensors, batch), oracle, adam_step(tensors, oracle)


def adam_step(tensors: dict[str, torch.Tensor], oracle: Expected) -> dict[str, torch.Tensor]:
    """The weights after one step of PyTorch's own AdamW on clipped gradients."""
    parameters = {}
    for name, tensor in tensors.items():
        parameters[name] = torch.nn.Parameter(tensor.clone())
        parameters[name].grad = oracle.gradients[name].clone()
    torch.nn.utils.clip_grad_norm_(parameters.values(), ADAM.clip_grad)
    # Norms decay with the rest, as in PyTorch's default.
    torch.optim.AdamW(
        parameters.values(),
        lr=ADAM.learning_rate,
        betas=(ADAM.beta1, ADAM.beta2),
        eps=ADAM.eps,
        weight_decay=ADAM.weight_decay,
    ).step()
    return {name: parameter.detach() for name, parameter in parameters.items()}


@pytest.fixture(scope="module")
def runs() -> dict[str, tuple[dict[str, Any], Expected, dict[str, torch.Tensor]]]:
    found = {}
    for world_size, layouts in ((1, ONE_RANK), (2, TWO_RANKS)):
        made = {name: case(layout) for name, layout in layouts.items()}
        inputs = {name: parts[0] for name, parts in made.items()}
        results = run_distributed("actor_bodies.passes", world_size, inputs)
        for name, (_, oracle, stepped) in made.items():
            found[name] = (results[name], oracle, stepped)
    return found


every_layout = pytest.mark.parametrize("name", [*ONE_RANK, *TWO_RANKS])


def worst(got: dict[str, torch.Tensor], want: dict[str, torch.Tensor]) -> dict[str, float]:
    """The tensors that are off by more than RELATIVE of their largest entry."""
    assert got.keys() == want.keys()
    errors = {
        name: float((got[name] - want[name]).abs().max() / want[name].abs().max()) for name in want
    }
    # `not <=` so that a nan counts as off.
    return {name: error for name, error in errors.items() if not error <= RELATIVE}


@every_layout
def test_logprobs_equal_transformers(runs: Any, name: str) -> None:
    result, oracle, _ = runs[name]
    assert oracle.logprobs.abs().max() > 1  # the weights are far from a uniform distribution
    torch.testing.assert_close(result["logprobs"], oracle.logprobs, rtol=0, atol=2e-5)


@every_layout
def test_the_loss_is_the_same_in_every_layout(runs: Any, name: str) -> None:
    result, oracle, _ = runs[name]
    assert result["loss"] == pytest.approx(oracle.loss, rel=1e-5, abs=1e-4)


@every_layout
def test_gradients_before_clipping_equal_autograd(runs: Any, name: str) -> None:
    result, oracle, _ = runs[name]
    assert worst(result["gradients"], oracle.gradients) == {}


@every_layout
def test_the_gradient_norm_is_that_of_the_whole_model(runs: Any, name: str) -> None:
    result, oracle, _ = runs[name]
    assert result["grad_norm"] == pytest.approx(oracle.grad_norm, rel=1e-5)


@every_layout
def test_a_step_is_adamw_on_clipped_gradients(runs: Any, name: str) -> None:
    result, oracle, stepped = runs[name]
    assert oracle.grad_norm > 2 * ADAM.clip_grad
    assert worst(result["stepped"], stepped) == {}


def test_a_share_of_sequences_that_micro_batches_do_not_divide_is_trained_on(runs: Any) -> None:
    assert runs["dense, 7 sequences in micro-batches of 3"][0]["micro_batches"] == [3, 3, 1]
    assert runs["dense DP2, uneven micro-batches"][0]["micro_batches"] == [3, 2]


@pytest.mark.parametrize("layout", ["dense DP2", "dense PP2", "MoE EP2"])
def test_micro_batches_under_a_budget_of_tokens_are_uneven(runs: Any, layout: str) -> None:
    # The tests above hold for them: log-probs, loss, gradients and the step.
    counts = runs[f"{layout}, packed by tokens"][0]["micro_batches"]
    assert len(counts) > 1
    assert len(set(counts)) > 1
