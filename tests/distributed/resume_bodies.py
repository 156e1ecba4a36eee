"""What the ranks do in tests of checkpoints. Each public function runs on every rank."""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from megatron_precision.actor.actor import Actor
from megatron_precision.checkpoint import store
from megatron_precision.checkpoint import store as generators
from megatron_precision.config.schema import ParallelConfig
from megatron_precision.precision.dtypes import torch_dtype
from megatron_precision.train.warm_start import full_tensors
from tests.distributed.actor_bodies import make_actor, weighted_logprobs
from tests.distributed.cases import Case


def _step(actor: Actor, case: Case) -> None:
    plan = actor.plan(case.batch, torch.arange(len(case.batch)))
    actor.step(case.batch, plan, weighted_logprobs)


def _states(actor: Actor) -> dict[str, torch.Tensor]:
    """This rank's parameters and ranges of optimizer states, by Megatron's own names."""
    found = {}
    for name, parameter, _ in actor.weights.parameters():
        found[name] = parameter.detach().clone()
        state = actor.optimizer.flat_state(parameter)
        for kind, values in state.tensors.items():
            found[f"{name} {kind} {state.begin}"] = values.clone()
    return found


def _differing(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> list[str]:
    mine = [n for n in before if n not in after or not torch.equal(before[n], after[n])]
    mine += [n for n in after if n not in before]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return sorted({name for part in everyone for name in part})


def _write(actor: Actor, model_dir: str, folder: Path, of_rank: dict[str, Any]) -> None:
    store.Writing(actor, folder, of_rank).finish()
    store.seal(folder, Path(model_dir), torch_dtype(actor.policy.params))
    dist.barrier()


def through_layouts(
    case: Case, model_dir: str, layouts: list[ParallelConfig], folder: str
) -> dict[str, Any]:
    """Two steps at the first layout, a checkpoint through all of them and back, and another step.

    Returns:
        What differs at the first layout after the way through the others, what is held there, and
        the weights after the third step, straight and on either way.
    """
    first = dataclasses.replace(case.config, parallel=layouts[0])
    actor = make_actor(first, case.tensors)
    for _ in range(2):
        _step(actor, case)
    before = _states(actor)
    path = Path(folder, "0")
    _write(actor, model_dir, path, {})
    _step(actor, case)
    straight = full_tensors(actor, first.model)
    stepped = {}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in case.tensors.items()}
    for number, layout in enumerate([*layouts[1:], layouts[0]], start=1):
        config = dataclasses.replace(case.config, parallel=layout)
        actor = make_actor(config, zeros)
        store.read(actor, path, 2, same_ranks=True)
        path = Path(folder, str(number))
        _write(actor, model_dir, path, {})
        after = _states(actor)
        _step(actor, case)
        stepped[str(layout)] = full_tensors(actor, config.model)
    return {
        "differing": _differing(before, after),
        "held": sorted({name.split()[1] for name in before if " " in name}),
        "applied": actor.optimizer.applied_steps,
        "straight": straight,
        "stepped": stepped,
    }


def a_damaged_file(case: Case, model_dir: str, folder: str) -> dict[str, list[str]]:
    """What is found wrong with a checkpoint as written, and with one bit flipped in each file."""
    actor = make_actor(case.config, case.tensors)
    whole = Path(folder, "whole")
    _write(actor, model_dir, whole, {})
    found = {"as written": store.damage(whole)}
    names = sorted(str(p.relative_to(whole)) for p in whole.rglob("*") if p.is_file())
    for name in names:
        broken = Path(folder, "broken")
        if dist.get_rank() == 0:
            shutil.copytree(whole, broken)
            content = bytearray((broken / name).read_bytes())
            content[len(content) // 2] ^= 1
            (broken / name).write_bytes(content)
        dist.barrier()
        try:
            found[name] = store.damage(broken)
        except ValueError as unreadable:
            found[name] = [str(unreadable)]
        dist.barrier()
        if dist.get_rank() == 0:
            shutil.rmtree(broken)
        dist.barrier()
    return found


def of_every_rank(case: Case, model_dir: str, folder: str) -> list[list[float]]:
    """Draws of every generator of every rank after a checkpoint, and after going back to it."""
    actor = make_actor(case.config, case.tensors)
    torch.manual_seed(100 + dist.get_rank())
    np.random.seed(200 + dist.get_rank())
    random.seed(300 + dist.get_rank())
    _write(actor, model_dir, Path(folder, "0"), {"generators": generators.capture()})
    first = _draws()
    found = store.read(actor, Path(folder, "0"), 0, same_ranks=True)
    generators.restore(found["generators"])
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [first, _draws()])
    return everyone


def damage_and_generators(case: Case, model_dir: str, folder: str) -> dict[str, Any]:
    """Both of the above in one world."""
    return {
        "damage": a_damaged_file(case, model_dir, f"{folder}/damage"),
        "draws": of_every_rank(case, model_dir, f"{folder}/draws"),
    }


def _draws() -> list[float]:
    return [float(torch.rand(())), float(np.random.rand()), random.random()]
