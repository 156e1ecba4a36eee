"""Sampling with seeds that are drawn ahead gives vLLM's own tokens."""

from __future__ import annotations

import types

import pytest
import torch

from megatron_precision.platform.vllm_sampling import draw_seeds_ahead


def generators(rows: int) -> dict[int, torch.Generator]:
    return {row: torch.Generator().manual_seed(100 + row) for row in range(rows)}


@pytest.mark.parametrize("mode", ["processed_logprobs", "processed_logits", "raw_logprobs"])
def test_tokens_and_logprobs_are_upstreams(mode: str) -> None:
    """Over steps in which requests finish, move to other rows, and meet some without a seed."""
    from vllm import _custom_ops  # noqa: F401 registers the kernel
    from vllm.v1.sample.ops.topk_topp_sampler import TopKTopPSampler

    sampler = types.SimpleNamespace(use_fp64_gumbel=False, logprobs_mode=mode)
    ours = draw_seeds_ahead(TopKTopPSampler.forward_cpu)
    results = []
    for sample in (TopKTopPSampler.forward_cpu, ours):
        torch.manual_seed(5)
        noise = torch.Generator().manual_seed(6)
        live = list(generators(40).values())
        seen: list[torch.Tensor] = []
        for step in range(150):
            rows = {row + step % 2: generator for row, generator in enumerate(live)}
            logits = torch.randn(len(live) + 2, 11, generator=noise)
            k = torch.full((len(live) + 2,), 5) if step % 3 == 0 else None
            tokens, returned = sample(sampler, logits.clone(), rows, k, None)
            seen += [tokens, torch.zeros(1) if returned is None else returned]
            if step % 7 == 0:
                live.pop(step % len(live))
            if step % 11 == 0:
                live.append(torch.Generator().manual_seed(1000 + step))
        results.append(seen)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len({tuple(tokens.tolist()) for tokens in results[0][::2]}) > 100
