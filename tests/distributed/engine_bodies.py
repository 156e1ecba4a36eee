"""What the ranks do in tests of trainer and engine together: one world, many experiments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megatron_precision.actor.batch import make_batch
from megatron_precision.config import RunConfig
from megatron_precision.data.arithmetic import make_questions
from megatron_precision.platform.startup import start
from megatron_precision.precision import audit
from megatron_precision.rollout.engine import Request, Rollout, Sampling, request_seed
from megatron_precision.rollout.sampling import Prompt, Sampler, TokenDisagreementError
from megatron_precision.train.session import Session
from megatron_precision.weights import sync as sync_module
from megatron_precision.weights.hf_model import write_checkpoint
from megatron_precision.weights.proof import hf_forward, prove_sync
from megatron_precision.weights.sync import WeightSyncError

Tensors = Mapping[str, torch.Tensor]


def open_session(config: RunConfig, tensors: Tensors, folder: str) -> Session:
    start(config.seed)
    model_dir = Path(folder, "model")
    session = Session(config, config.optimizer, config.loss_scale, model_dir)
    if dist.get_rank() == 0:
        write_checkpoint(model_dir, config.model, tensors)
    dist.barrier()
    session.load_start()
    session.open_engine()
    return session


def questions(config: RunConfig, count: int) -> list[Any]:
    return make_questions(config.task, split="train", count=count, seed=1)


def error_of(kind: type[Exception], action: Callable[[], Any]) -> str:
    """The message of what `action` raises, or nothing where it raises nothing."""
    try:
        action()
    except kind as error:
        return str(error)
    return ""


def train_on_nothing(session: Session) -> None:
    """Give the trainer other weights of the same distribution: every tensor shifted by one."""
    tensors = session.sync.gathering.gather()
    session.actor.load({n: t.flatten().roll(1).view(t.shape) for n, t in tensors.items()})


def push_of_other_weights(session: Session, prompts: list[list[int]]) -> dict[str, Any]:
    """New trainer weights, pushed; what the engine then scores, and the weights themselves."""
    train_on_nothing(session)
    before = session.engine.score(prompts)
    result = session.sync.push(7)
    return {
        "tensors": {n: t.clone() for n, t in session.sync.gathering.gather().items()},
        "prompts": prompts,
        "before": before,
        "scores": session.engine.score(prompts),
        "verified": result.verified,
        "weight_version": session.engine.weight_version,
    }


def mismatch(session: Session, config: RunConfig) -> dict[str, torch.Tensor]:
    """The engine's log-probs of what it sampled, and the trainer's of the same tokens."""
    prompts = [
        Prompt(q.id, tuple(session.tokenizer.encode(q.prompt))) for q in questions(config, 16)
    ]
    rollouts, _ = session.sampler.sample(
        prompts,
        rollouts_per_prompt=4,
        purpose="test",
        iteration=0,
        sampling=Sampling(1.0, 40, True),
        reward=lambda _: 0.0,
    )
    batch = make_batch(
        [rollout.request.prompt_tokens for rollout in rollouts],
        [rollout.tokens for rollout in rollouts],
        [rollout.rollout_logprobs for rollout in rollouts],
        torch.ones(len(rollouts)),
    )
    trainer = session.actor.logprobs(batch, [torch.arange(len(batch))])
    mask = batch.response_mask
    return {"engine": batch.rollout_logprobs[mask], "trainer": trainer[mask]}


def sampled_in(session: Session, requests: list[Request], parts: int) -> dict[Any, Any]:
    """Tokens by request, submitted in so many parts with some steps in between."""
    size = -(-len(requests) // parts)
    finished: list[Rollout] = []
    for begin in range(0, len(requests), size):
        session.engine.submit(requests[begin : begin + size], Sampling(1.0, 20, True))
        for _ in range(3):
            finished += session.engine.step()
    while session.engine.unfinished:
        finished += session.engine.step()
    return {(r.request.prompt, r.request.rollout): r.tokens for r in finished}


def some_requests(session: Session, config: RunConfig) -> list[Request]:
    return [
        Request(
            number,
            rollout,
            tuple(session.tokenizer.encode(question.prompt)),
            request_seed(config.seed, "test", 0, question.id, rollout),
        )
        for number, question in enumerate(questions(config, 4))
        for rollout in range(4)
    ]


def recorded_logprobs(session: Session, config: RunConfig) -> list[dict[Any, Any]]:
    """Log-probs by request: as the engine takes them, and as vLLM records them itself."""
    engine, sampling = session.engine, Sampling(1.0, 20, True)
    engine.submit(some_requests(session, config), sampling)
    ours = {}
    while engine.unfinished:
        ours |= {(r.request.prompt, r.request.rollout): r.rollout_logprobs for r in engine.step()}
    taking = engine._runner.__dict__.pop("_bookkeeping_sync")
    engine.submit(some_requests(session, config), sampling)
    vllms = {}
    while len(vllms) < len(ours):
        for output in engine.llm.step():
            request = engine._requests.pop(output.request_id)
            found = tuple(output.outputs[0].logprobs.logprobs)
            vllms[request.prompt, request.rollout] = found
    engine._runner._bookkeeping_sync = taking
    return [ours, vllms]


def submissions(session: Session, config: RunConfig) -> list[dict[Any, Any]]:
    """The same requests at once, again, in two halves, one by one and in reverse."""
    requests = some_requests(session, config)
    orders = [(requests, 1), (requests, 1), (requests, 2), (requests, 16), (requests[::-1], 1)]
    return [sampled_in(session, order, parts) for order, parts in orders]


def disagreement(session: Session, config: RunConfig) -> str:
    """What the sampler says when one rank has another seed."""
    seed = config.seed + dist.get_rank()
    sampler = Sampler(session.engine, dataclasses.replace(config, seed=seed))
    prompts = [Prompt(f"p{n}", (3 + n, 5)) for n in range(8)]

    def sample() -> None:
        # One token each, so that the ranks stay in step although their tokens differ.
        sampler.sample(
            prompts,
            rollouts_per_prompt=2,
            purpose="test",
            iteration=0,
            sampling=Sampling(1.0, 1, False),
            reward=lambda _: 0.0,
        )

    return error_of(TokenDisagreementError, sample)


def with_load(session: Session, change: Callable[[Tensors], Tensors | None]) -> str:
    """What a push says when the tensors are changed, or lost, between gather and load."""
    engine = session.engine
    load = engine.load

    def changed(tensors: Tensors, weight_version: int) -> None:
        given = change(tensors)
        if given is not None:
            load(given, weight_version)

    engine.load = changed  # type: ignore[method-assign]
    try:
        return error_of(WeightSyncError, lambda: session.sync.push(8))
    finally:
        engine.load = load  # type: ignore[method-assign]


def one_element_off(name: str) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        damaged = tensors[name].clone()
        damaged.view(-1)[-3] += 1
        return {**tensors, name: damaged}

    return change


def lost_pushes(session: Session, prompts: list[list[int]]) -> dict[str, str]:
    """A load that does nothing: what the push says, the proof, and the proof with no read-back."""
    engine, config = session.engine, session.config
    load, verify = engine.load, sync_module.verify_engine
    engine.load = lambda tensors, version: None  # type: ignore[method-assign]

    def prove() -> None:
        prove_sync(
            session.sync, engine, config.policy.rollout_params, prompts, hf_forward(config.model)
        )

    try:
        read_back = error_of(WeightSyncError, prove)
        sync_module.verify_engine = lambda *_: (1, [])
        return {"proof": read_back, "proof without read-back": error_of(WeightSyncError, prove)}
    finally:
        engine.load = load  # type: ignore[method-assign]
        sync_module.verify_engine = verify


def damaged_pushes(session: Session, prompts: list[list[int]], moe: bool) -> dict[str, Any]:
    """Every way to break a push, and what is said of it."""
    names = list(session.sync.gathering.gather())
    found: dict[str, Any] = {
        "one element": {name: with_load(session, one_element_off(name)) for name in names}
    }
    found["intact again"] = with_load(session, lambda tensors: tensors)
    found |= lost_pushes(session, prompts)
    train_on_nothing(session)
    found["lost"] = with_load(session, lambda tensors: None)
    if moe:
        repack = session.engine._repack_experts
        session.engine._repack_experts = lambda: None  # type: ignore[method-assign]
        found["not repacked"] = error_of(WeightSyncError, lambda: session.sync.push(9))
        session.engine._repack_experts = repack  # type: ignore[method-assign]
    session.sync.push(10)
    return found


def dropped_tensors(session: Session, names: list[str]) -> dict[str, str]:
    """Pushes of new weights in which one tensor is missing."""
    found = {}
    for name in names:
        train_on_nothing(session)
        found[name] = with_load(
            session, lambda tensors, gone=name: {n: t for n, t in tensors.items() if n != gone}
        )
        session.sync.push(11)
    return found


def audited(session: Session, wrong: torch.dtype) -> str:
    """The audit with one trainer parameter cast and one of the engine's KV caches faked."""
    norm = dict(session.actor.model.module.named_parameters())["decoder.final_layernorm.weight"]
    kept, caches = norm.data, session.engine.kv_caches
    norm.data = norm.data.to(wrong)
    engine = SimpleNamespace(
        model=session.engine.model, kv_caches=[caches[0], caches[1][:1].to(wrong)]
    )
    readings = [
        *audit.read_trainer(session.actor.model, session.actor.optimizer.megatron),
        *audit.read_engine(engine),
    ]
    norm.data = kept
    return error_of(audit.PrecisionAuditError, lambda: audit.check(readings, session.actor.policy))


def experiments(
    config: RunConfig, tensors: dict[str, torch.Tensor], wrong: torch.dtype, folder: str
) -> dict[str, Any]:
    """Open trainer and engine as a run does, then all of the above."""
    session = open_session(config, tensors, folder)
    dtypes = session.check(questions(config, 8))
    prompts = [session.tokenizer.encode(q.prompt + q.solution) for q in questions(config, 6)]
    found = {
        "dtypes": dtypes,
        "mismatch": mismatch(session, config),
        "submissions": submissions(session, config),
        "recorded": recorded_logprobs(session, config),
        "disagreement": disagreement(session, config),
        "audit": audited(session, wrong),
        "push": push_of_other_weights(session, prompts),
        "damaged": damaged_pushes(session, prompts, config.model.num_experts > 0),
    }
    found["dtypes again"] = session.check(questions(config, 8))
    experts = "model.layers.1.mlp.experts.2.up_proj.weight"
    dense = "model.layers.1.mlp.up_proj.weight"
    last = experts if config.model.num_experts else dense
    found["dropped"] = dropped_tensors(
        session, ["model.layers.0.self_attn.k_proj.weight", "model.norm.weight", last]
    )
    return found


def mismatch_alone(
    config: RunConfig, tensors: dict[str, torch.Tensor], folder: str
) -> dict[str, torch.Tensor]:
    """Only the mismatch, for another precision."""
    session = open_session(config, tensors, folder)
    session.sync.push(0)
    return mismatch(session, config)
