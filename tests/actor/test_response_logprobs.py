"""Log-probs and entropies from a sharded vocabulary, against FP64 formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.harness import run_distributed

VOCAB, PADDED, TEMPERATURE = 37, 48, 0.7
Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int, float]


def make_inputs(vocab_size: int, dtype: torch.dtype = torch.float32) -> Inputs:
    """[3, 7] tokens; padded columns hold values that would swamp the softmax if they took part."""
    generator = torch.Generator().manual_seed(5)
    logits = 3 * torch.randn(3, 7, PADDED, generator=generator)
    logits[..., vocab_size:] = 50.0
    tokens = torch.randint(0, vocab_size, (3, 7), generator=generator)
    # The last real token is the one beside the padding.
    tokens[0, 3] = vocab_size - 1
    mask = torch.zeros(3, 7, dtype=torch.bool)
    mask[0, 2:6] = True
    mask[1, 1:] = True  # a prompt of one token; row 2 has no response at all
    weights = torch.randn(3, 7, generator=generator)
    return logits.to(dtype), tokens, mask, weights, vocab_size, TEMPERATURE


def by_hand(inputs: Inputs) -> dict[str, torch.Tensor]:
    """FP64, one position at a time, over the real vocabulary alone."""
    logits, tokens, mask, weights, vocab_size, temperature = inputs
    wide = logits.double().requires_grad_(True)
    logprobs, entropies = torch.zeros(3, 7).double(), torch.zeros(3, 7).double()
    loss = torch.zeros((), dtype=torch.float64)
    for row, t in mask.nonzero().tolist():
        scores = wide[row, t - 1, :vocab_size] / temperature
        terms = scores - torch.log(torch.exp(scores).sum())
        logprobs[row, t] = terms[tokens[row, t]].detach()
        entropies[row, t] = -(terms.exp() * terms).sum().detach()
        loss = loss + weights[row, t].double() * terms[tokens[row, t]]
    (gradient,) = torch.autograd.grad(loss, wide)
    return {"logprobs": logprobs, "entropies": entropies, "gradient": gradient}


CASES: dict[str, tuple[Inputs, int]] = {
    "one rank": (make_inputs(VOCAB), 1),
    "two ranks": (make_inputs(VOCAB), 2),
    "two ranks, the second holds padding alone": (make_inputs(23), 2),
    "two ranks, FP16 logits": (make_inputs(VOCAB, torch.float16), 2),
}
SILENT = "two ranks, nobody responds"


@pytest.fixture(scope="module", params=["", "_by_kernels"], ids=["operators", "kernels"])
def results(request: pytest.FixtureRequest) -> dict[str, dict[str, torch.Tensor]]:
    found: dict[str, dict[str, torch.Tensor]] = {}
    for world_size in (1, 2):
        cases = {name: inputs for name, (inputs, size) in CASES.items() if size == world_size}
        if world_size == 2:
            logits, tokens, mask, *more = make_inputs(VOCAB)
            cases[SILENT] = (logits, tokens, torch.zeros_like(mask), *more)  # type: ignore[assignment]
        body = f"actor_bodies.many_sharded_logprobs{request.param}"
        found |= run_distributed(body, world_size, cases)
    return found


every_case = pytest.mark.parametrize("name", CASES)


@every_case
@pytest.mark.parametrize("what", ["logprobs", "entropies"])
def test_values_equal_fp64_over_the_real_vocabulary(results: Any, name: str, what: str) -> None:
    want = by_hand(CASES[name][0])[what]
    got = results[name][what]
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), want, rtol=0, atol=3e-6)


@every_case
def test_gradients_equal_fp64_autograd(results: Any, name: str) -> None:
    inputs = CASES[name][0]
    got = results[name]["gradient"]
    assert got.dtype == inputs[0].dtype
    # The gradient is rounded once, to the logits' dtype.
    atol = 1e-6 if got.dtype == torch.float32 else 1e-3
    torch.testing.assert_close(got.double(), by_hand(inputs)["gradient"], rtol=0, atol=atol)


@every_case
def test_padded_columns_get_no_gradient(results: Any, name: str) -> None:
    vocab_size = CASES[name][0][4]
    assert results[name]["gradient"][..., vocab_size:].abs().max() == 0


def test_everything_outside_the_response_is_zero(results: Any) -> None:
    mask = CASES["two ranks"][0][2]
    for what in ("logprobs", "entropies"):
        assert (results["two ranks"][what][~mask] == 0).all()


def test_no_response_is_no_gradient(results: Any) -> None:
    assert all((value == 0).all() for value in results[SILENT].values())
