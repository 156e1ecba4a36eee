"""Judges whether a configuration fits its GPUs, and searches for the nearest layout that fits.

The search tries all layouts that `checks/layout.py` accepts: the trainer's TP, PP, EP and ETP, and
the engine's TP. The nearest layout changes the fewest sizes, and among those, by the least.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_precision.checks.layout import kv_token_bytes, layout_problems
from megatron_precision.config.errors import Problem
from megatron_precision.config.schema import ParallelConfig, RunConfig
from megatron_precision.preflight import memory

GB = 10**9
# A KV cache for fewer sequences of the full length is too slow to be worth suggesting.
CACHED_SEQUENCES = 4
# If a job does not fit, GPUs with more memory (GB each) are tried, then this many times the GPUs.
_LARGER_CARDS = (141,)
_MORE_GPUS = (2, 4, 8)


@dataclass(frozen=True)
class Verdict:
    """Whether a configuration fits GPUs with a given memory.

    Attributes:
        gpu_gb: memory of each GPU in 1e9 bytes.
        found: memory of the configuration's fullest rank.
    """

    config: RunConfig
    gpu_gb: int
    found: memory.Memory

    @property
    def needed(self) -> int:
        """The bytes that the fullest rank needs, including the reserve."""
        return memory.needed(self.config, self.found)

    @property
    def fits(self) -> bool:
        """Whether the fullest rank needs no more than the GPU has."""
        return self.needed <= self.gpu_gb * GB


def judge(config: RunConfig, gpu_gb: int) -> Verdict:
    """Judge whether a valid configuration fits GPUs of `gpu_gb` · 1e9 bytes."""
    return Verdict(config, gpu_gb, memory.of_run(config))


def nearest(config: RunConfig, gpu_gb: int, gpus: int | None = None) -> Verdict | None:
    """Find the layout that fits and is most like the configuration's.

    Args:
        config: a configuration that is valid except for its layout.
        gpus: number of GPUs; by default the configuration's.

    Returns:
        None if no layout for this number of GPUs fits.
    """
    verdicts = (
        _with_room_for_cache(judge(candidate, gpu_gb))
        for candidate in _candidates(config, gpus or config.parallel.world_size)
    )
    fitting = [verdict for verdict in verdicts if verdict.fits]
    return min(
        fitting,
        key=lambda v: (*_distance(v.config, config), v.needed),
        default=None,
    )


def refusal(verdict: Verdict) -> Problem:
    """Describe why a configuration does not fit, and suggest the nearest one that does."""
    config, gpu_gb = verdict.config, verdict.gpu_gb
    gpus = config.parallel.world_size
    return Problem(
        what=f"{config.recipe} does not fit {gpus} GPUs of {gpu_gb} GB",
        where=describe(config.parallel),
        got=f"{verdict.needed / GB:.1f} GB on the fullest rank, {_largest(verdict.found)}",
        expected=f"at most {gpu_gb} GB a rank",
        remedy=_remedy(verdict),
    )


def describe(layout: ParallelConfig) -> str:
    """Write a layout as words for `--set`, without sizes of 1."""
    names = ("tp_size", "pp_size", "ep_size", "etp_size", "rollout_tp_size")
    sizes = [(n, getattr(layout, n)) for n in names]
    return " ".join(f"parallel.{n}={s}" for n, s in sizes if s > 1 or n == "rollout_tp_size")


def other_sizes(config: RunConfig, gpu_gb: int) -> str:
    """Name the powers of two next to the job's size that have a layout, each with its nearest."""
    below = 1 << (config.parallel.world_size.bit_length() - 1)
    found = (nearest(config, gpu_gb, gpus) for gpus in (below, 2 * below))
    return "; ".join(
        f"{v.config.parallel.world_size} GPUs with {describe(v.config.parallel)} ({_total(v)})"
        for v in found
        if v is not None
    )


def _remedy(verdict: Verdict) -> str:
    config, gpu_gb, gpus = verdict.config, verdict.gpu_gb, verdict.config.parallel.world_size
    same = nearest(config, gpu_gb)
    if same is not None:
        return f"nearest that fits: --set {changes(same.config, config)} ({_total(same)})"
    found = []
    for size_gpus, size_gb in (
        *((gpus, gb) for gb in _LARGER_CARDS if gb > gpu_gb),
        *((gpus * times, gpu_gb) for times in _MORE_GPUS),
    ):
        other = nearest(config, size_gb, size_gpus)
        if other is not None:
            found.append(
                f"{size_gpus} GPUs of {size_gb} GB with {describe(other.config.parallel)} "
                f"rollout.kv_cache_mib={other.config.rollout.kv_cache_mib} "
                f"({_total(other)})"
            )
        if other is not None and size_gpus > gpus:
            break
    text = f"no layout of {gpus} GPUs of {gpu_gb} GB fits"
    text += f"; nearest that fit: {'; or '.join(found)}" if found else ""
    return text + _handed_over(config, gpu_gb)


def _handed_over(config: RunConfig, gpu_gb: int) -> str:
    """Say whether offloading trainer and engine would fit, or the optimizer on the host as well."""
    words = ["memory.engine_sleep=drop_weights"]
    trainer = config.policy.params != "fp32"
    words += ["memory.offload_trainer=true"] if trainer else []
    handed = dataclasses.replace(
        config.memory, engine_sleep="drop_weights", offload_trainer=trainer
    )
    on_host = dataclasses.replace(handed, optimizer_offload=1.0)
    for saved, more in ((handed, []), (on_host, ["memory.optimizer_offload=1.0"])):
        if saved == config.memory:
            continue
        found = nearest(dataclasses.replace(config, memory=saved), gpu_gb)
        if found is not None:
            layout = describe(found.config.parallel)
            return (
                f"; with {' '.join([*words, *more])} {layout} "
                f"rollout.kv_cache_mib={found.config.rollout.kv_cache_mib} would fit "
                f"({_total(found)}; never run on a GPU)"
            )
    return ""


def _candidates(config: RunConfig, gpus: int) -> Iterator[RunConfig]:
    """Yield the configuration with every valid layout of `gpus` ranks.

    Settings that trade memory for speed are set to save memory. Sizes that do not divide what they
    must are left out before a configuration is made: of 161,051 combinations on 1,024 ranks some
    hundreds are left.
    """
    memory_saved = dataclasses.replace(config.memory, recompute="full", attention="fused")
    model, ranks = config.model, _divisors(gpus)
    kv_heads = _divisors(model.num_key_value_heads)
    experts = _divisors(model.num_experts) if model.num_experts else [1]
    inner = _divisors(model.moe_intermediate_size) if model.num_experts else [1]
    tps = [n for n in ranks if n in kv_heads]
    pps = [n for n in ranks if model.num_hidden_layers % n == 0]
    rollout_tps = [n for n in ranks if model.num_attention_heads % n == 0]
    eps, etps = ([n for n in ranks if n in sizes] for sizes in (experts, inner))
    trainers = [
        (tp, pp, ep, etp)
        for tp, pp, ep, etp in itertools.product(tps, pps, eps, etps)
        if gpus % (tp * pp) == 0 and gpus % (ep * etp * pp) == 0
    ]
    for tp, pp, ep, etp in trainers:
        for rollout_tp in rollout_tps:
            layout = ParallelConfig(gpus, tp, pp, ep, etp, tp > 1, rollout_tp)
            candidate = dataclasses.replace(config, parallel=layout, memory=memory_saved)
            if not layout_problems(candidate):
                yield candidate


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _with_room_for_cache(verdict: Verdict) -> Verdict:
    """Shrink the KV cache of a layout that does not fit until it does, if enough cache is left."""
    config = verdict.config
    without = dataclasses.replace(verdict.found, kv_cache=0)
    room = verdict.gpu_gb * GB - memory.needed(config, without)
    worthwhile = CACHED_SEQUENCES * kv_token_bytes(config) * config.max_sequence_tokens
    if verdict.fits or room < worthwhile:
        return verdict
    rollout = dataclasses.replace(config.rollout, kv_cache_mib=room // 2**30 * 1024)
    smaller = dataclasses.replace(config, rollout=rollout)
    return verdict if rollout.kv_cache_mib == 0 else judge(smaller, verdict.gpu_gb)


def _distance(one: RunConfig, other: RunConfig) -> tuple[int, float]:
    """Return how many sizes and settings differ, and the sizes' distance in factors of two."""
    names = ("tp_size", "pp_size", "ep_size", "etp_size", "rollout_tp_size")
    factors = [
        abs(math.log2(getattr(one.parallel, name) / getattr(other.parallel, name)))
        for name in names
    ]
    changed = sum(factor > 0 for factor in factors)
    changed += (one.memory != other.memory) + (one.rollout != other.rollout)
    return changed, sum(factors)


def changes(to: RunConfig, config: RunConfig) -> str:
    """Write the settings that turn `config` into `to`, as words for `--set`."""
    found = []
    for section in ("parallel", "memory", "rollout"):
        for part in dataclasses.fields(getattr(to, section)):
            new, old = (getattr(getattr(c, section), part.name) for c in (to, config))
            if new != old:
                found.append(f"{section}.{part.name}={str(new).lower()}")
    return " ".join(found)


def _largest(found: memory.Memory) -> str:
    parts = {part.name: getattr(found, part.name) for part in dataclasses.fields(found)}
    first = sorted(parts, key=lambda name: parts[name], reverse=True)[:3]
    return "of it " + ", ".join(
        f"{name.replace('_', ' ')} {parts[name] / GB:.1f}" for name in first
    )


def _total(verdict: Verdict) -> str:
    return f"{verdict.needed / GB:.1f} GB a rank"
