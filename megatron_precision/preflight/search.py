"""The nearest layout that fits: what a refusal names.

All layouts that `layout_checks.py` accepts are tried: trainer TP, PP, EP and ETP, and the engine's
TP. Nearest is the one that changes the fewest sizes, then the one with the smallest changes.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

from megatron_precision.checks import layout as layout_checks
from megatron_precision.config.errors import Problem
from megatron_precision.config.schema import ParallelConfig, RunConfig
from megatron_precision.preflight import memory

GB = 10**9
# A cache of fewer sequences of the full length decodes too few at once to be worth suggesting.
CACHED_SEQUENCES = 4
# Where a job does not fit, larger ones are tried in this order: (GPUs times, GB each).
_LARGER_CARDS = (141,)
_MORE_GPUS = (2, 4, 8)


@dataclass(frozen=True)
class Verdict:
    """Whether a configuration fits GPUs of a size.

    Attributes:
        config: the configuration.
        gpu_gb: of each GPU, 1e9 bytes.
        found: memory of its fullest rank.
    """

    config: RunConfig
    gpu_gb: int
    found: memory.Memory

    @property
    def needed(self) -> int:
        """Bytes that the fullest rank needs, the reserve included."""
        return memory.needed(self.config, self.found)

    @property
    def fits(self) -> bool:
        """Whether the fullest rank needs no more than the GPU has."""
        return self.needed <= self.gpu_gb * GB


def judge(config: RunConfig, gpu_gb: int) -> Verdict:
    """The verdict on a valid configuration."""
    return Verdict(config, gpu_gb, memory.of_run(config))


def nearest(config: RunConfig, gpu_gb: int, gpus: int | None = None) -> Verdict | None:
    """The fitting layout that is most like the configuration's.

    Args:
        config: a configuration that is valid but for its layout.
        gpus: of the job; by default the configuration's.

    Returns:
        None where no layout of so many GPUs fits.
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
    """Why a configuration does not fit, and the nearest thing that does."""
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
    """A layout in the words of `--set`, sizes of 1 left out."""
    names = ("tp_size", "pp_size", "ep_size", "etp_size", "rollout_tp_size")
    sizes = [(n, getattr(layout, n)) for n in names]
    return " ".join(f"parallel.{n}={s}" for n, s in sizes if s > 1 or n == "rollout_tp_size")


def other_sizes(config: RunConfig, gpu_gb: int) -> str:
    """The powers of two next to a job's size that have a layout, each with the nearest."""
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
    """Whether handing memory over would do, or the optimizer on the host besides."""
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
    """Every valid layout of so many ranks; what only costs memory is set to cost least.

    Sizes that divide nothing they must are left out before a configuration is made: of 161,051
    combinations on 1,024 ranks some hundreds are left.
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
            if not layout_checks.layout_problems(candidate):
                yield candidate


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def _with_room_for_cache(verdict: Verdict) -> Verdict:
    """The same layout with the KV cache that it has room for, where that is worth running."""
    config = verdict.config
    without = dataclasses.replace(verdict.found, kv_cache=0)
    room = verdict.gpu_gb * GB - memory.needed(config, without)
    worthwhile = (
        CACHED_SEQUENCES * layout_checks.kv_token_bytes(config) * config.max_sequence_tokens
    )
    if verdict.fits or room < worthwhile:
        return verdict
    rollout = dataclasses.replace(config.rollout, kv_cache_mib=room // 2**30 * 1024)
    smaller = dataclasses.replace(config, rollout=rollout)
    return verdict if rollout.kv_cache_mib == 0 else judge(smaller, verdict.gpu_gb)


def _distance(one: RunConfig, other: RunConfig) -> tuple[int, float]:
    """(sizes that differ, how far apart they are in factors of two)."""
    names = ("tp_size", "pp_size", "ep_size", "etp_size", "rollout_tp_size")
    factors = [
        abs(math.log2(getattr(one.parallel, name) / getattr(other.parallel, name)))
        for name in names
    ]
    changed = sum(factor > 0 for factor in factors)
    changed += (one.memory != other.memory) + (one.rollout != other.rollout)
    return changed, sum(factors)


def changes(to: RunConfig, config: RunConfig) -> str:
    """What makes one configuration of another, in the words of `--set`."""
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
