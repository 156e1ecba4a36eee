"""What a rank does in tests of one GPU; without GPU kernels each of these runs on gloo as well."""

from __future__ import annotations

from typing import Any

import torch

from benchmarks.gpu.measures import attention_backends
from megatron_precision.config.schema import RunConfig
from megatron_precision.platform import startup
from megatron_precision.train.session import Offloader
from megatron_precision.train.weight_sync import WeightSyncError
from tests.distributed.actor_bodies import make_actor, weighted_logprobs
from tests.distributed.cases import Case
from tests.distributed.engine_bodies import error_of, open_session, train_on_nothing
from tests.distributed.optimizer_bodies import changed, snapshot


def parameters(case: Case) -> dict[str, tuple[tuple[int, ...], str, str]]:
    """Shape, dtype and device of every parameter of the trainer's model."""
    actor = make_actor(case.config, case.tensors)
    return {
        name: (tuple(p.shape), str(p.dtype), p.device.type)
        for name, p in actor.model.module.named_parameters()
    }


def overflow(case: Case) -> dict[str, Any]:
    """A good step, one with an inf in a gradient, and a good one: what each changed."""
    actor = make_actor(case.config, case.tensors)
    rows = torch.arange(len(case.batch))
    plan = actor.plan(case.batch, rows)
    found = []
    for spoiled in (False, True, False):
        actor.gradients(case.batch, plan, weighted_logprobs)
        if spoiled:
            actor.model.buffers[0].grad_data.view(-1)[0] = float("inf")
        before = snapshot(actor)
        outcome = actor.optimizer.step()
        scale = actor.optimizer.loss_scale
        assert scale is not None
        found.append((outcome.skipped, bool(changed(before, snapshot(actor))), scale.value))
    return {"steps": found, "applied": actor.optimizer.applied_steps}


def proven_sync(config: RunConfig, tensors: dict[str, torch.Tensor], folder: str) -> dict[str, Any]:
    """Audit and proof; a push of other weights; and what is said of one flipped bit."""
    session = open_session(config, tensors, folder)
    dtypes = session.check()
    train_on_nothing(session)
    pushed = session.sync.push(3)
    complaints = {}
    for parameter in session.sync.transfer.engine.parameters:
        if parameter.kernel == "packed linear":
            continue
        live = parameter.live
        bits = live.view(torch.int16 if live.dtype.itemsize == 2 else torch.int32).view(-1)
        bits[0] ^= 1
        complaints[parameter.name] = error_of(WeightSyncError, lambda: session.sync.prove(3))
        bits[0] ^= 1
    return {
        "device": startup.device().type,
        "dtypes": dtypes,
        "regions": pushed.regions,
        "unnoticed": [name for name, said in complaints.items() if name not in said],
        "checked": len(complaints),
        "after": error_of(WeightSyncError, lambda: session.sync.prove(3)),
    }


def attention(case: Case) -> dict[str, bool]:
    """Which of its kernels Transformer Engine took for a pass."""
    actor = make_actor(case.config, case.tensors)
    actor.logprobs(case.batch, [torch.arange(len(case.batch))])
    return attention_backends()


def turns(config: RunConfig, tensors: dict[str, torch.Tensor], folder: str) -> dict[str, Any]:
    """Both sides step aside and come back, twice: what differs afterwards, and what was given."""
    session = open_session(config, tensors, folder)
    session.check()
    prompts = [[3, 5, 7, 11], [2, 4, 6]]
    offloader = Offloader(session, config)
    scores = session.engine.score(prompts)
    engine = {n: p.detach().clone() for n, p in session.engine.model.named_parameters()}
    trainer = snapshot(session.actor)
    free: dict[str, int] = {}

    def note(name: str) -> None:
        if startup.device().type == "cuda":
            torch.cuda.empty_cache()
            free[name] = torch.cuda.mem_get_info()[0]

    for _ in range(2):
        note("engine's turn")
        offloader.reload_trainer()
        note("trainer's turn")
        differing = changed(trainer, snapshot(session.actor))
        offloader.wake_engine_weights()
        session.sync.push(session.engine.weight_version)
        offloader.offload_trainer()
    note("engine's turn again")
    with offloader.trainer_on_device():  # as for a checkpoint: nothing has changed
        differing += changed(trainer, snapshot(session.actor))
    return {
        "trainer": differing,
        "engine": [
            name
            for name, parameter in session.engine.model.named_parameters()
            if not torch.equal(parameter, engine[name])
        ],
        "scores": session.engine.score(prompts) == scores,
        "free": free,
    }
