"""vLLM's CPU sampler without a call of `torch.randint` for every request of every step.

Upstream draws the seed of each token with one `torch.randint` of the request's own generator: 7 µs
a token, a tenth of a rollout of a tiny model. A generator gives the same numbers when it is asked
for many at once, so they are drawn ahead, and every token is what it was.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

_AHEAD = 64
_MAX_SEED = 2**31


class SeedsDrawnAhead:
    """The next seeds of each generator."""

    def __init__(self) -> None:
        # By identity; the generator is kept, so that its identity is not given to another.
        self._drawn: dict[int, tuple[torch.Generator, list[int]]] = {}

    def fill(self, seeds: torch.Tensor, generators: Mapping[int, torch.Generator]) -> None:
        """Put into `seeds` [rows], int64, what `torch.randint` of each row's generator gives."""
        if len(self._drawn) > 2 * len(generators) + _AHEAD:
            known = {id(generator) for generator in generators.values()}
            self._drawn = {key: kept for key, kept in self._drawn.items() if key in known}
        rows = torch.tensor(list(generators), dtype=torch.long)
        seeds[rows] = torch.tensor([self._next(generator) for generator in generators.values()])

    def _next(self, generator: torch.Generator) -> int:
        kept = self._drawn.get(id(generator))
        if kept is None:
            kept = self._drawn[id(generator)] = (generator, [])
        seeds = kept[1]
        if not seeds:
            seeds += torch.randint(0, _MAX_SEED, (_AHEAD,), generator=generator).tolist()
            seeds.reverse()
        return seeds.pop()


def draw_seeds_ahead(original: Callable[..., Any]) -> Callable[..., Any]:
    """`TopKTopPSampler.forward_cpu`; with FP64 noise, which has no seeds, as it was."""
    ahead = SeedsDrawnAhead()

    @functools.wraps(original)
    def forward_cpu(
        self: Any,
        logits: torch.Tensor,
        generators: dict[int, torch.Generator],
        k: torch.Tensor | None,
        p: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

        if self.use_fp64_gumbel or not generators:
            result: tuple[torch.Tensor, torch.Tensor | None]
            result = original(self, logits, generators, k, p)
            return result
        logits = apply_top_k_top_p(logits, k, p)
        returned = None
        if self.logprobs_mode == "processed_logits":
            returned = logits
        elif self.logprobs_mode == "processed_logprobs":
            returned = logits.log_softmax(dim=-1, dtype=torch.float32)
        seeds = torch.randint(0, _MAX_SEED, (logits.shape[0],), dtype=torch.long)
        ahead.fill(seeds, generators)
        return torch.ops._C.fused_gumbel_argmax(logits.to(torch.float32), seeds), returned

    return forward_cpu
