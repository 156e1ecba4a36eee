"""What the ranks do in tests of routing replay. Each public function runs on every rank."""

from __future__ import annotations

from typing import Any

import torch

from tests.distributed.actor_bodies import full_gradients, make_actor, weighted_logprobs
from tests.distributed.cases import Case


def passes(cases: dict[str, Case]) -> dict[str, dict[str, Any]]:
    """For each case: log-probs of a forward-only pass, gradients of a step, and flips of both."""
    results = {}
    for name, case in cases.items():
        actor = make_actor(case.config, case.tensors)
        rows = torch.arange(len(case.batch))
        actor.routing.record(*case.batch.tokens.shape)
        logprobs = actor.logprobs(case.batch, [rows], temperature=1.0)
        flipped = actor.routing.take_recorded()
        flips = actor.router_flips()
        assert actor.router_flips() is None, "flips were counted twice"
        actor.gradients(case.batch, actor.plan(case.batch, rows), weighted_logprobs)
        assert actor.router_flips() is None, "flips of a pass that nobody asked about"
        results[name] = {
            "logprobs": logprobs,
            "gradients": full_gradients(actor),
            "flips": flips,
            "flipped": flipped,
        }
    return results
