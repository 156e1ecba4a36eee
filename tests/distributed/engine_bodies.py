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
from megatron.core import dist_checkpointing
from safetensors.torch import load_file

from megatron_precision.actor.batch import make_batch
from megatron_precision.config.schema import RunConfig
from megatron_precision.data.arithmetic import CharTokenizer, make_questions, warm_start_batches
from megatron_precision.data.tasks import arithmetic_task
from megatron_precision.layouts.architectures import hf_shapes
from megatron_precision.layouts.hf_files import write_checkpoint
from megatron_precision.layouts.megatron import ShardCoordinates, megatron_regions
from megatron_precision.layouts.vllm import vllm_regions
from megatron_precision.platform.startup import start
from megatron_precision.precision import audit
from megatron_precision.rewards.grading import graded
from megatron_precision.rollout.engine import Request, Rollout, Sampling, request_seed
from megatron_precision.rollout.sampling import Prompt, Sampler, TokenDisagreementError
from megatron_precision.sync.plan import RankPlan, rank_groups
from megatron_precision.sync.transfer import Proof
from megatron_precision.train.session import Session
from megatron_precision.train.sync_proof import prove_sync
from megatron_precision.train.warm_start import _supervised_step, full_tensors
from megatron_precision.train.weight_sync import WeightSyncError
from tools.checkpoint_convert.convert import export_checkpoint

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
    session.actor.weights.load({n: t.flatten().roll(1).view(t.shape) for n, t in tensors.items()})


def exported(session: Session, folder: Path) -> dict[str, torch.Tensor]:
    """The trainer's weights as Megatron saves them and the converter exports them."""
    megatron, back = folder / "saved", folder / "exported"
    if dist.get_rank() == 0:
        megatron.mkdir()
    dist.barrier()
    dist_checkpointing.save(session.actor.model.module.sharded_state_dict(), str(megatron))
    if dist.get_rank() == 0:
        export_checkpoint(megatron, back, config=folder / "model")
    dist.barrier()
    return {n: t for file in back.glob("*.safetensors") for n, t in load_file(file).items()}


def push_of_other_weights(
    session: Session, prompts: list[list[int]], folder: str
) -> dict[str, Any]:
    """New trainer weights, pushed; what the engine then scores, and the weights themselves."""
    train_on_nothing(session)
    before = session.engine.score(prompts)
    result = session.sync.push(7)
    return {
        "tensors": full_tensors(session.actor, session.config.model),
        "exported": exported(session, Path(folder)),
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


def first_bit_flipped(tensor: torch.Tensor) -> None:
    """Padding follows the vocabulary's rows; the first element is never padding."""
    bits = tensor.view(torch.int16 if tensor.dtype.itemsize == 2 else torch.int32).view(-1)
    bits[0] ^= 1


def flipped_bits(session: Session) -> dict[str, str]:
    """One bit of what each kernel reads flipped, and what a proof without a push says.

    An opaque packed copy cannot be reached: vLLM packs it anew, with the bit flipped.
    """
    weights = session.sync.transfer.engine
    found = {}
    for parameter in weights.parameters:
        name = parameter.name
        if parameter.kernel != "packed linear":
            first_bit_flipped(parameter.live)
            found[name] = error_of(WeightSyncError, lambda: session.sync.prove(8))
            first_bit_flipped(parameter.live)
            continue
        true = weights.reads(name)[0].clone(memory_format=torch.contiguous_format)
        changed = true.clone()
        first_bit_flipped(changed)
        weights.load({name: changed})
        found[name] = error_of(WeightSyncError, lambda: session.sync.prove(8))
        weights.load({name: true})
    return found


def damaged_staging(session: Session) -> dict[str, str]:
    """One bit of each staged parameter flipped on its way into the kernel."""
    weights = session.sync.transfer.engine
    load = type(weights).load
    found = {}
    for name in [n for staged in session.sync.transfer._staged for n in staged]:

        def changed(staged: Tensors, name: str = name) -> None:
            if name in staged:
                first_bit_flipped(staged[name])
            load(weights, staged)

        with put(weights, "load", changed):
            found[name] = error_of(WeightSyncError, lambda: session.sync.push(8))
    return found


@dataclasses.dataclass
class Regions:
    """Regions on one way: their tensors, and where each goes and comes from."""

    names: list[str]
    to: list[torch.Tensor]
    source: list[torch.Tensor]


def plans(session: Session) -> list[RankPlan]:
    """This rank's, a group of layers each."""
    return rank_groups(session.sync.transfer._planner, dist.get_rank())


def local_copies(session: Session) -> Regions:
    """Those of the first group of layers."""
    group = session.sync.transfer.transport._groups[1]
    names = [cell.hf_name for cell in plans(session)[1].copies]
    return Regions(names, group.copy_to, group.copy_from)


def arriving(session: Session) -> tuple[list[Any], int] | None:
    """The steps of a group, and which of them is the first with a packed message for this rank."""
    for steps in session.sync.transfer.transport._steps:
        for number, step in enumerate(steps):
            if step.receive.views:
                return steps, number
    return None


def arriving_message(session: Session) -> Regions:
    """The regions of the first packed message from the other rank; of some ranks, none."""
    for plan, steps in zip(plans(session), session.sync.transfer.transport._steps, strict=True):
        for step in steps:
            if step.receive.views:
                (cells,) = plan.direct.receives.values()
                assert len(cells) == len(step.receive.views)
                names = [cell.hf_name for cell in cells]
                return Regions(names, step.receive.views, step.receive.slices)
    return Regions([], [], [])


def damaged_routes(session: Session, regions: Regions) -> dict[str, tuple[list[str], str]]:
    """Regions dropped, misdirected and duplicated: (their tensors, complaint)."""
    pairs = [
        (a, b)
        for a, one in enumerate(regions.to)
        for b, other in enumerate(regions.to)
        if a < b and one.shape == other.shape and one.ndim > 1
    ]
    first, second = pairs[0] if pairs else (-1, -1)
    found = {}

    def broken(kind: str, whose: list[int], ends: list[Any], change: Callable[[Any], Any]) -> None:
        kept = list(ends)
        if pairs:
            ends[:] = change(kept)
        found[kind] = [regions.names[n] for n in whose if pairs], complaint(session)
        ends[:] = kept

    def nowhere(views: list[torch.Tensor]) -> list[torch.Tensor]:
        return [v.clone() if n == first else v for n, v in enumerate(views)]

    def swapped(views: list[torch.Tensor]) -> list[torch.Tensor]:
        other = {first: second, second: first}
        return [views[other.get(n, n)] for n in range(len(views))]

    def doubled(views: list[torch.Tensor]) -> list[torch.Tensor]:
        return [views[second] if n == first else v for n, v in enumerate(views)]

    broken("dropped", [first], regions.to, nowhere)
    broken("misdirected", [first, second], regions.to, swapped)
    broken("duplicated", [first], regions.source, doubled)
    return found


def corrupted_message(session: Session) -> tuple[list[str], str]:
    """One bit of a message flipped when it has arrived: (its tensor, complaint)."""
    there = arriving(session)
    if there is None:
        return [], complaint(session)
    steps, number = there
    step = steps[number]

    def corrupted() -> None:
        unpacked = step.receive.views[0]
        step.run()
        damaged = unpacked.clone(memory_format=torch.contiguous_format)
        first_bit_flipped(damaged)
        unpacked.copy_(damaged)

    steps[number] = SimpleNamespace(run=corrupted, receive=step.receive)
    message = complaint(session)
    steps[number] = step
    return arriving_message(session).names[:1], message


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
        "copies": damaged_routes(session, local_copies(session)),
        "messages": damaged_routes(session, arriving_message(session)),
        "message": corrupted_message(session),
    }
    if moe:
        found["not repacked"] = without_repacking(session)
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
        model=session.engine.model,
        head_dtype=session.engine.head_dtype,
        kv_caches=[caches[0], caches[1][:1].to(wrong)],
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
        "push": push_of_other_weights(session, prompts, folder),
        "damaged": damaged_pushes(session, prompts, config.model.num_experts > 0),
    }
    found["dtypes again"] = session.check()
    worker = session.engine.llm.model_executor.driver_worker.worker
    found["backend"] = (
        session.engine.llm.vllm_config.weight_transfer_config.backend,
        type(worker.weight_transfer_engine).__name__,
    )
    found["moved"] = moved(session, prompts)
    return found


def moved(session: Session, prompts: list[list[int]]) -> dict[str, Any]:
    """Scores before all tensors of both sides moved, and of pushes after it; plans made for it."""
    actor, model = session.actor, session.config.model
    true = {name: t.clone() for name, t in full_tensors(actor, model).items()}
    session.sync.push(20)
    found: dict[str, Any] = {"before": session.engine.score(prompts)}
    plans = rank_groups.cache_info().misses
    for parameter in actor.model.module.parameters():
        parameter.data = parameter.data.clone()
    for held in session.sync.transfer.engine.parameters:
        if not held.staged:
            getattr(held.layer, held.attribute).data = held.live.clone()
    train_on_nothing(session)
    session.sync.push(21)
    found["other weights"] = session.engine.score(prompts)
    actor.weights.load(true)
    session.sync.push(22)
    found["after"] = session.engine.score(prompts)
    found["plans"] = rank_groups.cache_info().misses - plans
    return found


def flips_alone(config: RunConfig, tensors: dict[str, torch.Tensor], folder: str) -> dict[str, Any]:
    """Only the flipped bits, for another dtype."""
    session = open_session(config, tensors, folder)
    train_on_nothing(session)
    session.sync.push(1)
    parameters = session.sync.transfer.engine.parameters
    return {"parameters": [p.name for p in parameters], "flipped": flipped_bits(session)}


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
        for region in megatron_regions(name, shape, session.config.model, ShardCoordinates()):
            values = tensor.view(region.view)[region.spans].reshape(region.shape)
            found[region.hf_name][region.box] = values
    return found


def engine_tensors(session: Session) -> dict[str, torch.Tensor]:
    """What a one-rank engine's kernels read, as Hugging Face tensors."""
    model, engine = session.config.model, session.sync.transfer.engine
    found: dict[str, torch.Tensor] = {}
    for parameter in engine.parameters:
        for read in engine.reads(parameter.name):
            for region in vllm_regions(parameter.name, parameter.shape, model, ShardCoordinates()):
                # A copy: the kernel's own memory changes with the next push.
                part = read.view(region.view)[region.spans].reshape(region.shape).clone()
                found[region.hf_name] = part
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
        "prefixes": cached_prefixes(session),
    }


def cached_prefixes(session: Session) -> dict[str, tuple[tuple[int, ...], tuple[float, ...]]]:
    """What is sampled after a prompt of two blocks: before pushes, after one, and after another.

    Once with prefix caches as the push has left them, once with none; and after a push that keeps
    the caches.
    """
    engine = session.engine
    block = engine.llm.vllm_config.cache_config.block_size
    prompt = tuple(3 + n % 50 for n in range(2 * block + 1))

    def sampled() -> tuple[tuple[int, ...], tuple[float, ...]]:
        engine.submit([Request(0, 0, prompt, 7)], Sampling(1.0, 1, True))
        finished: list[Rollout] = []
        while engine.unfinished:
            finished += engine.step()
        return finished[0].tokens, finished[0].rollout_logprobs

    def without_cache() -> tuple[tuple[int, ...], tuple[float, ...]]:
        assert engine.llm.reset_prefix_cache()
        return sampled()

    found = {"before": sampled()}
    train_on_nothing(session)
    session.sync.push(4)
    found |= {"pushed": sampled(), "pushed, no cache": without_cache()}
    train_on_nothing(session)
    with put(engine.llm, "reset_prefix_cache", lambda: True):
        session.sync.push(5)
        found["caches kept"] = sampled()
    found["caches kept, no cache"] = without_cache()
    return found


def complaint_of_main_copies(session: Session) -> str:
    """What a proof says when one main copy has changed since the push."""
    for values in [values for _, values in session.actor.weights.main_copies().held if len(values)][
        :1
    ]:
        values[0] += 1
    return error_of(WeightSyncError, lambda: session.sync.prove(4))


def wide_heads(config: RunConfig, tensors: dict[str, torch.Tensor], folder: str) -> dict[str, Any]:
    """Audit and proof with both sides' heads in FP32, the mismatch, the dtypes of all logits."""
    session = open_session(config, tensors, folder)
    seen: set[str] = set()
    session.engine.model.logits_processor.register_forward_hook(
        lambda _module, _inputs, logits: seen.add(str(logits.dtype))
    )
    found = {"dtypes": session.check(), "mismatch": mismatch(session, config)}
    return {**found, "logits": sorted(seen)}
