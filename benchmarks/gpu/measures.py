"""The measures themselves, in the one process of a one-rank world.

Where the time of a step goes, by what its kernels do: PyTorch's profiler, added up by name.
"""

from __future__ import annotations

import gc
import re
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from benchmarks.gpu.cases import (
    QUESTIONS,
    ROLLOUTS,
    Case,
    flops_per_token,
    needed_bytes,
    peak_flops,
    sequence_lengths,
    shared_prompt_tokens,
)
from megatron_precision.actor import parallel
from megatron_precision.actor.actor import Actor, MicroLoss
from megatron_precision.actor.batch import Batch, make_batch
from megatron_precision.config.schema import ModelConfig, RunConfig
from megatron_precision.data.arithmetic import make_questions
from megatron_precision.data.tasks import arithmetic_task
from megatron_precision.layouts.architectures import hf_shapes
from megatron_precision.layouts.hf_files import write_checkpoint
from megatron_precision.platform import startup
from megatron_precision.precision.policy import DType
from megatron_precision.preflight import memory
from megatron_precision.rewards.grading import Grade, graded
from megatron_precision.rl.mismatch import mismatch_stats
from megatron_precision.rollout.engine import Rollout, Sampling
from megatron_precision.rollout.sampling import Prompt
from megatron_precision.sync.plan import rank_groups, rank_plan
from megatron_precision.train.session import Session
from megatron_precision.train.weight_sync import WeightSync

# The first that a kernel's name matches is its class. A name with none is "elementwise": those
# names say a functor and no purpose.
CLASSES: tuple[tuple[str, str], ...] = (
    ("attention", r"fmha|flash|sdpa|attention"),
    ("optimizer", r"adam|multi_tensor|foreach"),
    ("norm", r"norm"),
    ("products", r"gemm|nvjet|cutlass|cublas|xmma|splitk|::(mm|bmm|addmm|matmul|baddbmm)\b"),
    ("log-probs", r"softmax|logsumexp|cross_entropy"),
    ("routing, gathers", r"permute|sort|topk|scatter|gather|index(?=_|select|put|func|ing)|cumsum"),
    ("copies and casts", r"memcpy|memset|copy|\bcast|_cast\b|fill|::(zero_|to|clone|cat)\b"),
    ("communication", r"nccl|all_?reduce|reduce_scatter"),
)
REST = "elementwise"
LONGEST = 20


def class_of(kernel: str) -> str:
    """What a kernel is for, by its name."""
    return next((name for name, words in CLASSES if re.search(words, kernel, re.I)), REST)


def profiled(step: Callable[[], object]) -> dict[str, Any]:
    """Run a step once under the profiler.

    Returns:
        `seconds` of the step, profiler included; `busy_s`, the sum of its kernels, which run one
        after the other on a GPU; `by_class`, seconds of each; and the longest kernels by name. On
        a CPU PyTorch's operators stand for kernels.
    """
    gpu = startup.device().type == "cuda"
    # A step of a large model has a million operators on the host; nobody asks for them here.
    activity = ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as found:
        begin = time.perf_counter()
        step()
        if gpu:
            torch.cuda.synchronize()
        took = time.perf_counter() - begin
    kernels: dict[str, tuple[float, int]] = {}
    for event in found.key_averages():
        # Operators of the host carry their kernels' time too; an annotation spans others.
        if event.is_user_annotation or (event.device_type.name == "CUDA") != gpu:
            continue
        microseconds = event.self_device_time_total if gpu else event.self_cpu_time_total
        kernels[event.key] = (microseconds / 1e6, event.count)
    by_class: dict[str, float] = defaultdict(float)
    for name, (seconds, _count) in kernels.items():
        by_class[class_of(name)] += seconds
    longest = sorted(kernels.items(), key=lambda item: -item[1][0])[:LONGEST]
    return {
        "seconds": took,
        "busy_s": sum(by_class.values()),
        "by_class": dict(sorted(by_class.items(), key=lambda item: -item[1])),
        "longest": [{"kernel": k, "seconds": s, "count": n} for k, (s, n) in longest],
    }


WARMUP, ROUNDS = 2, 5
STEPS = 4  # of a trainer: each takes seconds
Facts = dict[str, Any]
Keep = Callable[[Facts], None]  # writes what there is so far


def synchronize() -> None:
    """Wait for the device, so that a clock tells what was done and not what was asked."""
    if startup.device().type == "cuda":
        torch.cuda.synchronize()


def seconds(action: Callable[[], object], rounds: int = ROUNDS, warmup: int = WARMUP) -> Facts:
    """Median, least and all seconds of an action after its warm-up."""
    times = []
    for number in range(warmup + rounds):
        synchronize()
        begin = time.perf_counter()
        action()
        synchronize()
        if number >= warmup:
            times.append(time.perf_counter() - begin)
    return {"median_s": statistics.median(times), "least_s": min(times), "all_s": times}


def allocated() -> Facts:
    """Memory of the device that this process's tensors hold, now and at most; empty on a CPU."""
    if startup.device().type != "cuda":
        return {}
    return {
        "allocated_bytes": torch.cuda.memory_allocated(),
        "peak_allocated_bytes": torch.cuda.max_memory_allocated(),
        "free_bytes": torch.cuda.mem_get_info()[0],
    }


def too_large(case: Case, config: RunConfig) -> str:
    """Why this GPU cannot hold a measure; empty where it can, and on a CPU."""
    if startup.device().type != "cuda":
        return ""
    needed = needed_bytes(case, config) + memory.RESERVE_BYTES
    free = torch.cuda.mem_get_info()[0]
    if needed <= free:
        return ""
    return f"{needed / 1e9:.0f} GB by the estimate, and this GPU has {free / 1e9:.0f} free"


def attention_backends() -> dict[str, bool]:
    """Which of its attention kernels Transformer Engine took last; empty without it."""
    name = "transformer_engine.pytorch.attention.dot_product_attention"
    chosen = getattr(sys.modules.get(name), "_attention_backends", {})
    return {key: bool(value) for key, value in chosen.items() if key.startswith("use_")}


def weights(model: ModelConfig, seed: int) -> dict[str, torch.Tensor]:
    """Random weights by their Hugging Face names, BF16: both 16-bit dtypes start from the same.

    Drawn on the device, where it takes no time, and kept on the host.
    """
    from megatron_precision.precision.dtypes import torch_dtype

    device = startup.device()
    generator = torch.Generator(device).manual_seed(seed)
    dtype: DType = "bf16"
    found = {}
    for name, shape in hf_shapes(model).items():
        if len(shape) == 1 and name.endswith("norm.weight"):
            found[name] = torch.ones(shape, dtype=torch_dtype(dtype))
            continue
        values = torch.randn(shape, generator=generator, device=device) * model.initializer_range
        found[name] = values.to(torch_dtype(dtype)).cpu()
    return found


def batch_of(config: RunConfig, lengths: list[int]) -> Batch:
    """Random sequences of these lengths, of which all but a few tokens are response."""
    generator = torch.Generator().manual_seed(config.seed)
    vocabulary, prompt = config.model.vocab_size, min(32, min(lengths) // 4)
    rows = [torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in lengths]
    zeros = [[0.0] * (len(row) - prompt) for row in rows]
    heads, tails = [row[:prompt] for row in rows], [row[prompt:] for row in rows]
    return make_batch(heads, tails, zeros, torch.ones(len(rows)))


def train(config: RunConfig, _folder: Path, keep: Keep, _others: Mapping[str, RunConfig]) -> Facts:
    """Optimizer steps of the trainer alone: tokens/s, MFU, memory against the estimate, and what
    the time of a step is made of."""
    parallel.open_world(startup.backend())
    parallel.divide_world(config.parallel, config.seed)
    actor = Actor(config, config.optimizer, config.loss_scale)
    actor.weights.load(weights(config.model, config.seed))
    lengths = sequence_lengths(config)
    batch = batch_of(config, lengths)
    plan = actor.plan(batch, torch.arange(len(lengths)))
    count = float(batch.response_mask.sum())

    def loss(_part: Batch, logprobs: torch.Tensor, _entropies: torch.Tensor) -> MicroLoss:
        return MicroLoss(-logprobs.sum() / count, {}, {})

    skipped = 0

    def step() -> None:
        nonlocal skipped
        skipped += actor.step(batch, plan, loss).outcome.skipped

    took = seconds(step, STEPS)
    tokens_per_s = sum(lengths) / took["median_s"]
    peak = peak_flops(str(startup.describe()["device"]))
    flops = sum(n * flops_per_token(config.model, n) for n in lengths) / sum(lengths)
    found = {
        "tokens_per_s": tokens_per_s,
        "flops_per_token": flops,
        "mfu": tokens_per_s * flops / peak if peak else None,
        "skipped_steps": skipped,
        "step": took,
        "attention": attention_backends(),
        "memory": allocated(),
        "planned_bytes": memory.of_trainer(config),
    }
    keep(found)
    return {**found, "profile": profiled(step)}


def engine(config: RunConfig, folder: Path, keep: Keep, others: Mapping[str, RunConfig]) -> Facts:
    """Both sides: audit and proof, rollout tokens/s, mismatch, sync, sleep and wake; and the
    mismatch of other trainers with the same responses."""
    model_dir = folder / "model"
    tensors = weights(config.model, config.seed)
    write_checkpoint(model_dir, config.model, tensors)
    questions = make_questions(config.task, split="train", count=QUESTIONS, seed=1)
    task = arithmetic_task(config.task, questions, config.seed)
    session = Session(config, config.optimizer, config.loss_scale, model_dir, task)
    session.load_start()
    session.open_engine()
    begin = time.perf_counter()
    found: Facts = {"audit": session.check()}
    found["audit_and_proof_s"] = time.perf_counter() - begin
    found["memory"] = allocated()
    rollouts, found["rollout"] = _rollouts(session, _prompts(session))
    batch = _batch_of_rollouts(rollouts)
    found["mismatch"] = _mismatch(session.actor, batch)
    found["attention"] = attention_backends()
    keep(found)
    found["sync"] = _sync(session)
    keep(found)
    found["sleep"] = _sleep(session)
    session.engine.sleep()  # room for another trainer
    found["other_trainers"] = {}
    for name, other in others.items():
        keep(found)
        actor = Actor(other, other.optimizer, other.loss_scale)
        actor.weights.load(tensors)
        found["other_trainers"][name] = _mismatch(actor, batch)
        del actor
        gc.collect()
    session.close()
    return found


def _prompts(session: Session) -> list[Prompt]:
    shared = range(shared_prompt_tokens(session.config))
    head = tuple(number % session.config.model.vocab_size for number in shared)
    questions = [p for part in session.task.train.values() for p in part.prompts]
    return [Prompt(str(n), (*head, *question.tokens)) for n, question in enumerate(questions)]


def _rollouts(session: Session, prompts: list[Prompt]) -> tuple[list[Rollout], Facts]:
    """Responses to the prompts, and tokens/s after a short call that warms up."""
    config = session.config

    def sample(iteration: int, max_tokens: int) -> tuple[list[Rollout], float]:
        sampling = Sampling(config.rollout.temperature, max_tokens)
        synchronize()
        begin = time.perf_counter()
        rollouts = session.sampler.sample(
            prompts,
            rollouts_per_prompt=ROLLOUTS,
            purpose="bench",
            iteration=iteration,
            sampling=sampling,
            grade=_ungraded,
        ).rollouts
        return rollouts, time.perf_counter() - begin

    longest = config.rollout.max_response_tokens
    sample(0, min(64, longest))
    rollouts, took = sample(1, longest)
    tokens = sum(len(rollout.tokens) for rollout in rollouts)
    return rollouts, {"tokens": tokens, "seconds": took, "tokens_per_s": tokens / took}


def _batch_of_rollouts(rollouts: list[Rollout]) -> Batch:
    return make_batch(
        [rollout.request.prompt_tokens for rollout in rollouts],
        [rollout.tokens for rollout in rollouts],
        [rollout.rollout_logprobs for rollout in rollouts],
        torch.zeros(len(rollouts)),
    )


def _mismatch(actor: Actor, batch: Batch) -> Facts:
    """Of a trainer with the engine that sampled a batch."""
    rows = torch.arange(len(batch)).split(actor.packing.micro_batch_size)
    stats = mismatch_stats(
        old_logprobs=actor.logprobs(batch, list(rows)),
        rollout_logprobs=batch.rollout_logprobs,
        mask=batch.response_mask,
    )
    return {name: value for name, value in stats.metrics().items() if not isinstance(value, list)}


def _ungraded(_rollout: Rollout) -> Future[Grade]:
    return graded(0.0)


def _sync(session: Session) -> Facts:
    """A push with its proof, without, and a copy of as many bytes within the device."""
    sync, version = session.sync, session.engine.weight_version
    live = [parameter.data for parameter in session.engine.model.parameters()]
    spare = [torch.empty_like(tensor) for tensor in live]

    def bind() -> None:
        rank_plan.cache_clear()  # they keep what follows from both layouts alone
        rank_groups.cache_clear()
        session.sync = WeightSync(session.actor, session.engine, session.config)

    return {
        "bytes": sum(tensor.nbytes for tensor in live),
        "copy": seconds(lambda: torch._foreach_copy_(spare, live)),
        "push": seconds(lambda: session.engine.update_weights(version)),
        "push_and_proof": seconds(lambda: sync.push(version)),
        "plan_and_bind": seconds(bind, rounds=2, warmup=0),
    }


def _sleep(session: Session) -> Facts:
    """Seconds and bytes of sleep and wake, and whether the weights are bit for bit what they were;
    empty where the engine does not sleep."""
    if session.config.memory.engine_sleep == "off":
        return {}
    first, later = _nap(session), _nap(session)
    equal = session.sync.prove(session.engine.weight_version).regions
    return {**later, "first_sleep_s": first["sleep_s"], "equal_regions": equal}


def _nap(session: Session) -> Facts:
    """One sleep and wake. The first also takes the memory of the host that weights lie in."""
    if startup.device().type == "cuda":
        torch.cuda.empty_cache()  # what PyTorch keeps is not given back by the engine
    before = allocated()
    begin = time.perf_counter()
    session.engine.sleep()
    slept = time.perf_counter()
    asleep = allocated()
    session.engine.wake("weights")
    woken = time.perf_counter()
    session.engine.wake("kv_cache")
    end = time.perf_counter()
    return {
        "sleep_s": slept - begin,
        "wake_weights_s": woken - slept,
        "wake_kv_cache_s": end - woken,
        "given_back_bytes": asleep["free_bytes"] - before["free_bytes"],
    }


Measure = Callable[[RunConfig, Path, Keep, Mapping[str, RunConfig]], Facts]
MEASURES: dict[str, Measure] = {"train": train, "engine": engine}
