"""Makes a start: supervised training by the Megatron actor, then the perfectible set.

The actor trains in FP32 on worked solutions until the engine, sampling at temperature 1, answers
40 to 60 % of held-back questions. If a stretch of training jumps over that window, its weights
are dropped and the next stretch is half as long. Then 40 responses per question are sampled, and
the questions with 20 to 80 % right responses are kept, as in the paper.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_precision.actor.actor import Actor
from megatron_precision.actor.batch import Batch
from megatron_precision.actor.parameters import gathered
from megatron_precision.config.schema import (
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    WarmStartConfig,
)
from megatron_precision.data import start as starts
from megatron_precision.data.arithmetic import (
    CharTokenizer,
    Question,
    SupervisedBatch,
    make_questions,
    warm_start_batches,
)
from megatron_precision.data.perfectible import (
    PerfectibleQuestion,
    select_perfectible,
    write_perfectible,
)
from megatron_precision.data.tasks import arithmetic_prompts, arithmetic_task
from megatron_precision.layouts.hf_files import write_checkpoint
from megatron_precision.precision.dtypes import torch_dtype
from megatron_precision.train.objective import supervised_objective
from megatron_precision.train.session import Session

# Above this accuracy the learning curve is steep: accuracy is measured four times as often.
STEEP_FROM = 0.15


def run(config: RunConfig) -> None:
    """Make the start of `config` in the cache; every rank of the world calls it.

    Raises:
        RuntimeError: where the warm start does not reach its window, or no question is left.
    """
    final = starts.start_dir(config)
    partial = final.with_name(final.name + ".partial")
    begin = time.perf_counter()
    warm = _warm_config(config)
    checks = make_questions(
        config.task, split="warm_start", count=config.warm_start.check_questions, seed=config.seed
    )
    task = arithmetic_task(config.task, checks, config.seed)
    session = Session(warm, warm.optimizer, warm.loss_scale, partial / starts.MODEL, task)
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
    dist.barrier()
    _write_model(session, partial, config)
    session.load_start()
    session.open_engine()
    session.check()

    curve = _train_into_window(session, config.warm_start, checks)
    lost = _round_to_bf16_grid(session)
    _write_model(session, partial, config)
    session.sync.push(1)
    accuracy = _accuracy(session, checks, config.warm_start.check_samples, iteration=10**6)
    _say(f"warm start done: accuracy {accuracy:.1%} after rounding to the BF16 grid")
    kept, asked = _perfectible(session, config)
    facts = {
        "accuracy": accuracy,
        "curve": curve,
        "perfectible": {"asked": asked, "kept": len(kept)},
        "fp16_underflows": lost,
        "seconds": time.perf_counter() - begin,
        "made_from": {
            "model": dataclasses.asdict(config.model),
            "task": dataclasses.asdict(config.task),
            "warm_start": dataclasses.asdict(config.warm_start),
            "perfectible": dataclasses.asdict(config.perfectible),
            "seed": config.seed,
        },
    }
    if dist.get_rank() == 0:
        write_perfectible(partial / starts.QUESTIONS, kept)
        (partial / starts.FACTS).write_text(json.dumps(facts, indent=2), encoding="utf-8")
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
    dist.barrier()


def _warm_config(config: RunConfig) -> RunConfig:
    warm = config.warm_start
    return dataclasses.replace(
        config,
        precision="fp32",
        optimizer=OptimizerConfig(
            learning_rate=warm.learning_rate,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.0,
            clip_grad=1.0,
            warmup_steps=warm.warmup_steps,
        ),
        train=dataclasses.replace(
            config.train,
            micro_batch_size=warm.micro_batch_size,
            micro_batch_tokens=0,
            packed_sequences=False,
        ),
    )


def _write_model(session: Session, folder: Path, config: RunConfig) -> None:
    """Write the trainer's weights as a Hugging Face checkpoint, on rank 0."""
    tensors = full_tensors(session.actor, config.model)
    if dist.get_rank() == 0:
        write_checkpoint(folder / starts.MODEL, config.model, tensors)
        CharTokenizer().save(folder / starts.MODEL)
    dist.barrier()


def _train_into_window(
    session: Session, warm: WarmStartConfig, checks: list[Question]
) -> list[tuple[int, float]]:
    """Train until the accuracy is inside the window.

    Returns:
        The learning curve, as (steps, accuracy).

    Raises:
        RuntimeError: where the window is not reached within `max_steps`.
    """
    stretch, steps = warm.check_every, 0
    curve: list[tuple[int, float]] = []
    batches = warm_start_batches(
        session.config.task, CharTokenizer(), batch_size=warm.batch_size, seed=session.config.seed
    )
    while steps < warm.max_steps:
        saved = full_tensors(session.actor, session.config.model)
        begin = time.perf_counter()
        for _ in range(stretch):
            _supervised_step(session, next(batches))
        steps += stretch
        trained_s = time.perf_counter() - begin
        session.sync.push(0)
        accuracy = _accuracy(session, checks, warm.check_samples, iteration=steps)
        curve.append((steps, accuracy))
        _say(f"warm start: {steps} steps, accuracy {accuracy:.1%}, {trained_s:.1f} s training")
        if warm.target_accuracy_low <= accuracy <= warm.target_accuracy_high:
            return curve
        if accuracy > warm.target_accuracy_high:
            if stretch == 1:
                break
            session.actor.weights.load(saved)
            stretch = max(1, stretch // 2)
        elif accuracy > STEEP_FROM:
            stretch = min(stretch, warm.check_every // 4)
    raise RuntimeError(
        f"the warm start did not settle between {warm.target_accuracy_low:.0%} and "
        f"{warm.target_accuracy_high:.0%} within {warm.max_steps} steps: {curve}. Change "
        "warm_start.max_steps, warm_start.learning_rate or task.difficulty"
    )


def _supervised_step(session: Session, supervised: SupervisedBatch) -> None:
    tokens = torch.from_numpy(supervised.tokens)
    batch = Batch(
        tokens=tokens,
        response_mask=torch.from_numpy(supervised.loss_mask),
        lengths=torch.from_numpy(supervised.lengths),
        rollout_logprobs=torch.zeros(tokens.shape),
        advantages=torch.ones(len(tokens)),
    )
    plan = session.actor.plan(batch, torch.arange(len(batch)))
    session.actor.step(batch, plan, supervised_objective(batch))


def _accuracy(session: Session, questions: list[Question], samples: int, iteration: int) -> float:
    sampled = session.rollouts.sample(
        arithmetic_prompts(questions),
        rollouts_per_prompt=samples,
        purpose="warm start",
        iteration=iteration,
        temperature=1.0,
        logprobs=False,
    )
    return float((sampled.rewards > 0).float().mean())


@torch.no_grad()
def _round_to_bf16_grid(session: Session) -> dict[str, int]:
    """Round the weights to BF16 values, so that every precision starts from the same weights.

    Returns:
        The number of weights, and of those that FP16 cannot represent exactly.
    """
    rounded = {
        name: tensor.to(torch_dtype("bf16")).float()
        for name, tensor in full_tensors(session.actor, session.config.model).items()
    }
    session.actor.weights.load(rounded)
    inexact = sum(int((t.to(torch_dtype("fp16")).float() != t).sum()) for t in rounded.values())
    return {"inexact": inexact, "weights": sum(t.numel() for t in rounded.values())}


def _perfectible(session: Session, config: RunConfig) -> tuple[list[PerfectibleQuestion], int]:
    questions = make_questions(
        config.task, split="train", count=config.task.train_questions, seed=config.seed
    )
    begin = time.perf_counter()
    sampled = session.rollouts.sample(
        arithmetic_prompts(questions),
        rollouts_per_prompt=config.perfectible.samples_per_question,
        purpose="perfectible",
        iteration=0,
        temperature=1.0,
        logprobs=False,
    )
    accuracies = (sampled.rewards > 0).double().mean(1).tolist()
    chosen = select_perfectible(
        accuracies, config.perfectible.accuracy_low, config.perfectible.accuracy_high
    )
    tokens = sum(len(rollout.tokens) for rollout in sampled.rollouts)
    _say(
        f"perfectible set: {len(chosen)} of {len(questions)} questions, {tokens} tokens in "
        f"{time.perf_counter() - begin:.1f} s"
    )
    if not chosen:
        raise RuntimeError("no question is answered sometimes: there is nothing to train on")
    return [PerfectibleQuestion(questions[i], accuracies[i]) for i in chosen], len(questions)


def _say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


@torch.no_grad()
def full_tensors(actor: Actor, model: ModelConfig) -> dict[str, torch.Tensor]:
    """Gather the trainer's current weights, in their own dtype; every rank calls it.

    Raises:
        PlanError: where the ranks' regions do not cover the model.
    """
    return gathered(actor.weights.views(), model)
