"""The memory plan against two real ranks of trainer and engine, by part and as a whole process.

    .venv/bin/torchrun --standalone --nproc-per-node 2 benchmarks/measure_memory.py \
        --case dense-tp --precision bf16 --out docs/benchmarks/raw/memory_dense_tp_bf16.json

Parts are counted: tensors of the trainer, of the engine and of the sync. Whole is the resident set
of rank 0's process from before the trainer is made: now, and at most within a phase. Random
weights; one optimizer step on what the engine has sampled.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import shlex
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_precision.actor.batch import make_batch
from megatron_precision.config.schema import (
    LossScaleConfig,
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
    RolloutConfig,
    RunConfig,
    TaskConfig,
    TrainConfig,
)
from megatron_precision.data.arithmetic import make_questions
from megatron_precision.data.tasks import arithmetic_task
from megatron_precision.launch import rank
from megatron_precision.layouts.architectures import hf_shapes
from megatron_precision.layouts.hf_files import write_checkpoint
from megatron_precision.platform.startup import start
from megatron_precision.preflight import memory, wire
from megatron_precision.rewards.grading import graded
from megatron_precision.rollout.engine import Sampling
from megatron_precision.rollout.sampling import Prompt
from megatron_precision.train.objective import supervised_objective
from megatron_precision.train.session import Session

MODEL = ModelConfig(
    vocab_size=8192,
    hidden_size=512,
    intermediate_size=1536,
    num_hidden_layers=8,
    num_attention_heads=8,
    num_key_value_heads=4,
    head_dim=64,
    initializer_range=0.02,
)
MOE = dataclasses.replace(
    MODEL, model_type="qwen3_moe", num_experts=8, num_experts_per_tok=2, moe_intermediate_size=512
)
CASES = {
    "dense-tp": (MODEL, ParallelConfig(2, 2, rollout_tp_size=2)),
    "dense-dp": (MODEL, ParallelConfig(2, 1, rollout_tp_size=1)),
    "moe-ep": (MOE, ParallelConfig(2, 1, 1, 2, rollout_tp_size=2)),
}
PROMPTS, ROLLOUTS, RESPONSE = 8, 2, 48


def run_config(case: str, precision: str) -> RunConfig:
    model, parallel = CASES[case]
    return RunConfig(
        "measure",
        precision=precision,
        model=model,
        parallel=parallel,
        task=TaskConfig(difficulty=4, train_questions=64),
        rollout=RolloutConfig(
            max_response_tokens=RESPONSE,
            kv_cache_mib=256,
            max_num_seqs=PROMPTS * ROLLOUTS,
            max_num_batched_tokens=2048,
        ),
        loss_scale=LossScaleConfig("fixed_start", initial_scale=64.0),
        train=TrainConfig(
            prompts_per_iteration=PROMPTS,
            prompts_per_mini_batch=PROMPTS,
            rollouts_per_prompt=ROLLOUTS,
            micro_batch_size=16,
        ),
        memory=MemoryConfig("none", attention="fused"),
    )


def resident(name: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"the kernel reports no {name}")


def measured(begin: int) -> dict[str, int]:
    """The resident set now and at most since the last call, above what it was at the start."""
    found = {"now": resident("VmRSS") - begin, "peak": resident("VmHWM") - begin}
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return found


def counted(session: Session) -> dict[str, int]:
    """Bytes of the tensors that are there, by the plan's parts."""
    actor, engine = session.actor, session.engine
    buffers = [*actor.model.buffers, *actor.model.expert_parallel_buffers]
    own = {p.untyped_storage().data_ptr() for p in actor.model.module.parameters()}
    own |= {b.param_data.untyped_storage().data_ptr() for b in buffers if b.param_data is not None}
    optimizer = 0
    for member in actor.optimizer.members:
        for group in member.optimizer.param_groups:
            for parameter in group["params"]:
                copy = parameter.untyped_storage().data_ptr() not in own
                optimizer += parameter.nbytes if copy else 0
                state = member.optimizer.state[parameter].values()
                optimizer += sum(v.nbytes for v in state if torch.is_tensor(v) and v.numel() > 1)
    # In the shape that the loader gives: the CPU's kernels keep as many elements, packed.
    transfer = session.sync.transfer
    assert transfer.engine is not None, "every rank here has an engine"
    itemsize = engine.kv_caches[0].itemsize
    return {
        "parameters": sum(p.nbytes for p in actor.model.module.parameters()),
        "gradients": sum(buffer.grad_data.nbytes for buffer in buffers),
        "optimizer": optimizer,
        "engine_weights": itemsize * sum(math.prod(p.shape) for p in transfer.engine.parameters),
        "kv_cache": sum(cache.nbytes for cache in engine.kv_caches),
        "sync_buffers": transfer.transport.buffer_bytes,
    }


def measure(config: RunConfig, model_dir: Path) -> dict[str, Any]:
    """What rank 0 holds, counted and as a whole; every rank calls it."""
    questions = make_questions(config.task, split="train", count=PROMPTS, seed=1)
    task = arithmetic_task(config.task, questions, config.seed)
    prompts = [Prompt(p.id, p.tokens) for p in task.train[""].prompts]
    if dist.get_rank() == 0:
        write_checkpoint(model_dir, config.model, _weights(config.model))
    dist.barrier()
    import vllm  # noqa: F401  its libraries are no part of the plan

    begin, found = resident("VmRSS"), {}
    measured(begin)
    session = Session(config, config.optimizer, config.loss_scale, model_dir, task)
    session.load_start()
    found["trainer made"] = measured(begin)
    session.open_engine()
    found["engine made"] = measured(begin)
    for number in range(1):
        sampled = session.sampler.sample(
            prompts,
            rollouts_per_prompt=ROLLOUTS,
            purpose="measure",
            iteration=number,
            sampling=Sampling(1.0, RESPONSE, True),
            grade=lambda _: graded(0.0),
        )
        found[f"rollout {number}"] = measured(begin)
        batch = make_batch(
            [rollout.request.prompt_tokens for rollout in sampled.rollouts],
            [rollout.tokens for rollout in sampled.rollouts],
            [rollout.rollout_logprobs for rollout in sampled.rollouts],
            torch.ones(len(sampled.rollouts)),
        )
        plan = session.actor.plan(batch, torch.arange(len(batch)))
        session.actor.step(batch, plan, supervised_objective(batch))
        found[f"training {number}"] = measured(begin)
        session.sync.push(number + 1)
        found[f"sync {number}"] = measured(begin)
    parts = counted(session)
    session.close()
    return {"resident": found, "parts": parts}


def _weights(model: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(shape, generator=generator) * 0.02
        for name, shape in hf_shapes(model).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", choices=CASES, required=True)
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    config = run_config(args.case, args.precision)
    rank.run(lambda: work(config, args.out), args.out.with_suffix(".job"))


def work(config: RunConfig, out: Path) -> None:
    start(config.seed)
    dist.init_process_group("gloo")
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    found = measure(config, Path(folder[0], "model"))
    if dist.get_rank() == 0:
        shutil.rmtree(folder[0])
        plan = memory.of_run(config, "cpu")
        found |= {
            "plan": dataclasses.asdict(plan),
            "plan_phases": memory.totals(config, plan),
            "plan_sync": dataclasses.asdict(wire.of_run(config, 2)),
            "command": shlex.join(["benchmarks/measure_memory.py", *sys.argv[1:]]),
        }
        out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
        print(json.dumps(found, indent=1))
    dist.barrier()


if __name__ == "__main__":
    main()
