"""What the ranks do in tests of trainer and engine together: one world, many experiments."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from megatron_precision.actor.batch import make_batch
from megatron_precision.config import RunConfig
from megatron_precision.data.arithmetic import make_questions
from megatron_precision.data.supervised import warm_start_batches
from megatron_precision.data.tasks import arithmetic_task
from megatron_precision.data.tokenizer import CharTokenizer
from megatron_precision.platform.startup import start
from megatron_precision.precision import audit
from megatron_precision.rewards.grading import graded
from megatron_precision.rollout.engine import Request, Rollout, Sampling, request_seed
from megatron_precision.rollout.sampling import Prompt, Sampler, TokenDisagreementError
from megatron_precision.train.prepare import _supervised_step
from megatron_precision.train.session import Session
from megatron_precision.weights.architectures import hf_shapes
from megatron_precision.weights.gathering import full_tensors
from megatron_precision.weights.hf_model import write_checkpoint
from megatron_precision.weights.megatron_layout import ShardCoordinates, megatron_pieces
from megatron_precision.weights.proof import prove_sync
from megatron_precision.weights.sync import WeightSyncError
from megatron_precision.weights.transfer import Proof
from megatron_precision.weights.vllm_layout import vllm_pieces

Tensors = Mapping[str, torch.Tensor]


def open_session(config: RunConfig, tensors: Tensors, folder: str) -> Session:
    start(config.seed)
    model_dir = Path(folder, "model")
    task = arithmetic_task(config.task, questions(config, 8), config.seed)
    session = Session(config, config.optimizer, config.loss_scale, model_dir, task)
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
    tensors = full_tensors(session.actor, session.config.model)
    session.actor.load({n: t.flatten().roll(1).view(t.shape) for n, t in tensors.items()})


def push_of_other_weights(session: Session, prompts: list[list[int]]) -> dict[str, Any]:
    """New trainer weights, pushed; what the engine then scores, and the weights themselves."""
    train_on_nothing(session)
    before = session.engine.score(prompts)
    result = session.sync.push(7)
    return {
        "tensors": full_tensors(session.actor, session.config.model),
        "prompts": prompts,
        "before": before,
        "scores": session.engine.score(prompts),
        "regions": result.regions,
        "weight_version": session.engine.weight_version,
    }


def mismatch(session: Session, config: RunConfig) -> dict[str, torch.Tensor]:
    """The engine's log-probs of what it sampled, and the trainer's of the same tokens."""
    prompts = [Prompt(q.id, tuple(CharTokenizer().encode(q.prompt))) for q in questions(config, 16)]
    sampled = session.sampler.sample(
        prompts,
        rollouts_per_prompt=4,
        purpose="test",
        iteration=0,
        sampling=Sampling(1.0, 40, True),
        grade=lambda _: graded(0.0),
    )
    batch = make_batch(
        [rollout.request.prompt_tokens for rollout in sampled.rollouts],
        [rollout.tokens for rollout in sampled.rollouts],
        [rollout.rollout_logprobs for rollout in sampled.rollouts],
        torch.ones(len(sampled.rollouts)),
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
            tuple(CharTokenizer().encode(question.prompt)),
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
            grade=lambda _: graded(0.0),
        )

    return error_of(TokenDisagreementError, sample)


def complaint(session: Session) -> str:
    """What a push of new trainer weights says."""
    train_on_nothing(session)
    return error_of(WeightSyncError, lambda: session.sync.push(8))


@contextlib.contextmanager
def put(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of an object replaced for a while."""
    kept = owner.__dict__.get(name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
        if kept is not None:
            setattr(owner, name, kept)


def flipped_bits(session: Session) -> dict[str, str]:
    """One bit of each live kernel tensor flipped, and what a proof without a push says."""
    found = {}
    for parameter in session.sync.transfer.engine.parameters:
        if parameter.kernel == "packed linear":
            continue  # the kernel's copy cannot be reached: see `damaged_staging`
        live = parameter.live
        # Padding follows the vocabulary's rows; the first element is never padding.
        bits = live.view(torch.int16 if live.dtype.itemsize == 2 else torch.int32).view(-1)
        bits[0] ^= 1
        found[parameter.name] = error_of(WeightSyncError, lambda: session.sync.prove(8))
        bits[0] ^= 1
    return found


def damaged_staging(session: Session) -> dict[str, str]:
    """One element of each staged parameter changed on its way into the kernel."""
    weights = session.sync.transfer.engine
    load = type(weights).load
    found = {}
    for name in [n for staged in session.sync.transfer._staged for n in staged]:

        def changed(staged: Tensors, name: str = name) -> None:
            if name in staged:
                staged[name].view(-1)[0] += 1
            load(weights, staged)

        with put(weights, "load", changed):
            found[name] = error_of(WeightSyncError, lambda: session.sync.push(8))
    return found


def damaged_routes(session: Session) -> dict[str, tuple[list[str], str]]:
    """Copies dropped, misdirected and duplicated, and a message corrupted: (tensors, complaint)."""
    transfer = session.sync.transfer
    group = transfer.transport._groups[1]
    names = [cell.hf_name for cell in transfer._proofs[1].needed]
    first, second = next(
        (a, b)
        for a, one in enumerate(group.copy_to)
        for b, other in enumerate(group.copy_to)
        if a < b and one.shape == other.shape and one.ndim > 1
    )
    found = {}

    def broken(kind: str, copies: list[int], which: str, change: Callable[[Any], Any]) -> None:
        kept = list(getattr(group, which))
        getattr(group, which)[:] = change(kept)
        found[kind] = [names[n] for n in copies], complaint(session)
        getattr(group, which)[:] = kept

    def nowhere(views: list[torch.Tensor]) -> list[torch.Tensor]:
        return [v.clone() if n == first else v for n, v in enumerate(views)]

    def swapped(views: list[torch.Tensor]) -> list[torch.Tensor]:
        other = {first: second, second: first}
        return [views[other.get(n, n)] for n in range(len(views))]

    def doubled(views: list[torch.Tensor]) -> list[torch.Tensor]:
        return [views[second] if n == first else v for n, v in enumerate(views)]

    broken("dropped", [first], "copy_to", nowhere)
    broken("misdirected", [first, second], "copy_to", swapped)
    broken("duplicated", [first], "copy_from", doubled)
    return found


def corrupted_message(session: Session) -> tuple[list[str], str]:
    """The first element of a message changed when it has arrived: (its tensors, complaint)."""
    transfer = session.sync.transfer
    transport = transfer.transport
    run_turn = type(transport)._run_turn
    received: list[torch.Tensor] = []

    def corrupted(turn: Any) -> None:
        run_turn(transport, turn)
        if turn.receives and not received:
            received.append(turn.receives[0].messages[0].views[0])
            received[0].view(-1)[0] += 1

    with put(transport, "_run_turn", corrupted):
        message = complaint(session)
    cells = [c for cells in transfer._proofs[0]._plan.direct.receives.values() for c in cells]
    return [cell.hf_name for cell in cells[:1]], message


def lost_pushes(session: Session, prompts: list[list[int]]) -> dict[str, str]:
    """A transfer that does nothing: what a push says, the proof, the proof with no read-back."""
    transfer = session.sync.transfer

    def prove() -> None:
        prove_sync(session.sync, session.engine, session.actor, prompts)

    with put(transfer, "run", lambda: None):
        found = {"lost": complaint(session), "proof": error_of(WeightSyncError, prove)}
        with put(transfer, "prove", lambda: Proof(1, [])):
            found["proof without read-back"] = error_of(WeightSyncError, prove)
    return found


def without_repacking(session: Session) -> str:
    """A push after which vLLM's CPU experts are not packed again."""
    with contextlib.ExitStack() as stack:
        for layer in session.engine.model.modules():
            kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
            if kernel is not None:
                nothing = lambda _layer: None  # noqa: E731
                stack.enter_context(
                    put(kernel.fused_experts, "process_weights_after_loading", nothing)
                )
        return complaint(session)


def damaged_pushes(session: Session, prompts: list[list[int]], moe: bool) -> dict[str, Any]:
    """Every way to break a push, and what is said of it; then an intact one."""
    parameters = session.sync.transfer.engine.parameters
    found: dict[str, Any] = {
        "parameters": [p.name for p in parameters],
        "staged": [p.name for p in parameters if p.staged],
        "flipped": flipped_bits(session),
        "staging": damaged_staging(session),
        "routes": damaged_routes(session),
    }
    if moe:
        found["not repacked"] = without_repacking(session)
    else:
        found["message"] = corrupted_message(session)
    found["intact again"] = complaint(session)
    found |= lost_pushes(session, prompts)
    session.sync.push(10)
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
    dtypes = session.check()
    prompts = [CharTokenizer().encode(q.prompt + q.solution) for q in questions(config, 6)]
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
    found["dtypes again"] = session.check()
    return found


def fresh_scores(
    config: RunConfig, tensors: dict[str, torch.Tensor], prompts: list[list[int]], folder: str
) -> list[list[float]]:
    """What an engine scores that has loaded a checkpoint by itself and was never pushed to."""
    return open_session(config, tensors, folder).engine.score(prompts)


def mismatch_alone(
    config: RunConfig, tensors: dict[str, torch.Tensor], folder: str
) -> dict[str, torch.Tensor]:
    """Only the mismatch, for another precision."""
    session = open_session(config, tensors, folder)
    session.sync.push(0)
    return mismatch(session, config)


def assembled_main_copies(session: Session) -> dict[str, torch.Tensor]:
    """Main copies as Hugging Face tensors, from Megatron's own groups and ranges of every rank."""
    mine = []
    names = {id(p): name for name, p in session.actor.model.module.named_parameters()}
    for member in session.actor.optimizer.members:
        for models, mains in zip(
            member.model_float16_groups, member.shard_fp32_from_float16_groups, strict=True
        ):
            for parameter, main in zip(models, mains, strict=True):
                held = member._get_model_param_range_map(parameter)["param"]
                mine.append((names[id(parameter)], tuple(parameter.shape), held.start, main.data))
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    whole: dict[str, torch.Tensor] = {}
    for name, shape, begin, values in itertools.chain(*everyone):
        flat = whole.setdefault(name, torch.full(shape, torch.nan)).view(-1)
        flat[begin : begin + len(values)] = values
    found = {name: torch.empty(shape) for name, shape in hf_shapes(session.config.model).items()}
    for name, tensor in whole.items():
        shape = tuple(tensor.shape)
        for piece in megatron_pieces(name, shape, session.config.model, ShardCoordinates()):
            values = tensor.view(piece.view)[piece.spans].reshape(piece.shape)
            found[piece.hf_name][piece.box] = values
    return found


def engine_tensors(session: Session) -> dict[str, torch.Tensor]:
    """What a one-rank engine's kernels read, as Hugging Face tensors."""
    model, engine = session.config.model, session.sync.transfer.engine
    found: dict[str, torch.Tensor] = {}
    for parameter in engine.parameters:
        for read in engine.reads(parameter.name):
            for piece in vllm_pieces(parameter.name, parameter.shape, model, ShardCoordinates()):
                found[piece.hf_name] = read.view(piece.view)[piece.spans].reshape(piece.shape)
    return found


def synced_main_copies(
    config: RunConfig, tensors: dict[str, torch.Tensor], folder: str
) -> dict[str, Any]:
    """A step, and a push of what the optimizer then holds: both sides, and the parameters."""
    session = open_session(config, tensors, folder)
    session.check()
    batches = warm_start_batches(config.task, CharTokenizer(), batch_size=16, seed=1)
    _supervised_step(session, next(batches))
    result = session.sync.push(3)
    return {
        "main": assembled_main_copies(session),
        "parameters": full_tensors(session.actor, config.model),
        "engine": engine_tensors(session),
        "bytes": result.bytes,
        "received": result.received_bytes,
        "damaged": complaint_of_main_copies(session),
    }


def complaint_of_main_copies(session: Session) -> str:
    """What a proof says when one main copy has changed since the push."""
    for values in [values for _, values in session.actor.main_copies().held if len(values)][:1]:
        values[0] += 1
    return error_of(WeightSyncError, lambda: session.sync.prove(4))
