"""How long an iteration takes at stated rates, and what a run costs. An estimate, never measured.

Rollout
    An engine's replica decodes B sequences at once: as many as `rollout.max_num_seqs`, its share
    of the requests, and its KV cache at the mean length allow. A step reads the weights (of
    experts, those that some of B tokens are sent to: 1 - (1 - k / E)^B of them) and the keys and
    values of the B sequences, and computes; the slower of the two decides, and the host's time to
    launch the kernels comes on top. No rollout is shorter than its longest response takes alone.
Training
    Operations at a share of the peak rate, and the pipeline's bubble, (p - 1 + m) / m for m
    micro-batches (arXiv 2104.04473, section 2.2.1). Then gradients are reduced and parameters
    gathered over data parallelism, over the slower link that a group spans; nothing overlaps.
Sync
    The larger share of a rank's NVLink and of its NIC, one after the other; no rank waits.

This module imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from megatron_precision.checks import layout as layout_checks
from megatron_precision.config.schema import RunConfig
from megatron_precision.layouts.vllm import padded_vocab_rows
from megatron_precision.precision.policy import BYTES_PER_ELEMENT
from megatron_precision.preflight import memory, work
from megatron_precision.preflight.wire import SyncBytes


@dataclass(frozen=True)
class Rates:
    """Of one GPU, in units of 1 and a second.

    Attributes:
        flops: peak of dense products in the trainer's dtype.
        mfu: share of it that passes and prefills reach, recomputation counted as work.
        hbm: bytes read.
        hbm_share: of it that decoding reaches.
        layer_launch_s: of the host, for a layer of a decoding step; 0 where steps are replayed.
        nvlink, nic: bytes, one way.
    """

    flops: float
    mfu: float
    hbm: float
    hbm_share: float
    layer_launch_s: float
    nvlink: float
    nic: float


@dataclass(frozen=True)
class Estimate:
    """One iteration.

    Attributes:
        decoding: sequences that a replica decodes at once.
        decoding_limit: what bounds them.
        decode_step_s: of one step.
        rollout_s, old_logprobs_s, training_s, exchange_s, sync_s: the phases; `exchange_s` is
            of gradients and parameters over data parallelism, all steps.
        longest_alone: the rollout lasts as long as one response of the full length.
        rollout_tokens_per_s: of the whole job.
        gpu_hours: of the iteration.
    """

    decoding: int
    decoding_limit: str
    decode_step_s: float
    rollout_s: float
    old_logprobs_s: float
    training_s: float
    exchange_s: float
    sync_s: float
    longest_alone: bool
    rollout_tokens_per_s: float
    gpu_hours: float

    @property
    def iteration_s(self) -> float:
        """All phases, one after the other."""
        trainer = self.old_logprobs_s + self.training_s + self.exchange_s
        return self.rollout_s + trainer + self.sync_s


def of_iteration(
    config: RunConfig,
    lengths: work.Lengths,
    done: work.Work,
    moved: SyncBytes,
    rates: Rates,
    ranks_per_node: int,
) -> Estimate:
    """The time of an iteration of a valid configuration.

    Args:
        done: the iteration's work at these lengths.
        moved: by one sync.
    """
    layout = config.parallel
    decoding, limit = _decoding(config, lengths, done)
    keys = lengths.prompt + lengths.response / 2
    step = decode_step_s(config, decoding, keys, rates)
    tokens = done.sampled_tokens / layout.rollout_replicas
    longest = config.rollout.max_response_tokens
    alone = longest * decode_step_s(config, 1, lengths.prompt + longest / 2, rates)
    rate = layout.world_size * rates.flops * rates.mfu
    full = tokens / decoding * step + done.prefill_flops / rate
    bubble = _bubble(config, lengths)
    found = Estimate(
        decoding=decoding,
        decoding_limit=limit,
        decode_step_s=step,
        rollout_s=max(full, alone),
        old_logprobs_s=done.old_logprobs_flops / rate * bubble,
        training_s=(done.training_flops + done.recomputed_flops) / rate * bubble,
        exchange_s=config.train.steps_per_iteration * _exchange_s(config, rates, ranks_per_node),
        sync_s=_sync_s(moved, rates, min(ranks_per_node, layout.world_size)),
        longest_alone=alone > full,
        rollout_tokens_per_s=done.sampled_tokens / max(full, alone),
        gpu_hours=0.0,
    )
    return dataclasses.replace(found, gpu_hours=found.iteration_s * layout.world_size / 3600)


def decode_step_s(config: RunConfig, sequences: int, keys: float, rates: Rates) -> float:
    """One token of each of so many sequences, on one replica.

    Args:
        keys: tokens before it, on average.
    """
    model, tp = config.model, config.parallel.rollout_tp_size
    element = BYTES_PER_ELEMENT[config.policy.rollout_params]
    read = memory.engine_elements(config)
    if not model.tie_word_embeddings:
        read -= padded_vocab_rows(model) // tp * model.hidden_size  # looked up, not read
    if model.num_experts:
        inner = model.moe_intermediate_size // tp
        experts = model.num_hidden_layers * model.num_experts * 3 * model.hidden_size * inner
        idle = (1 - model.num_experts_per_tok / model.num_experts) ** sequences
        read -= round(experts * idle)
    cache = sequences * keys * layout_checks.kv_token_bytes(config)
    flops = 2 * work.active_weights(model) + work.attention_flops(model, keys)
    reading = (read * element + cache) / (rates.hbm * rates.hbm_share)
    computing = sequences * flops / (tp * rates.flops * rates.mfu)
    return max(reading, computing) + model.num_hidden_layers * rates.layer_launch_s


def _decoding(config: RunConfig, lengths: work.Lengths, done: work.Work) -> tuple[int, str]:
    """Sequences that the fullest replica decodes at once, and what bounds them."""
    rollouts, replicas = config.train.rollouts_per_prompt, config.parallel.rollout_replicas
    prompts = math.ceil(done.sampled_sequences / rollouts / replicas)  # dealt by prompt
    tokens = config.rollout.kv_cache_mib * 2**20 / layout_checks.kv_token_bytes(config)
    bounds = {
        "rollout.max_num_seqs": config.rollout.max_num_seqs,
        "the requests": prompts * rollouts,
        "the KV cache": max(1, int(tokens / (lengths.prompt + lengths.response / 2))),
    }
    limit = min(bounds, key=lambda name: bounds[name])
    return bounds[limit], limit


def micro_batches(config: RunConfig, lengths: work.Lengths) -> int:
    """Of one rank in one optimizer step, at the mean length."""
    train = config.train
    sequences = train.prompts_per_mini_batch * train.rollouts_per_prompt / config.parallel.dp_size
    if train.micro_batch_tokens and train.packed_sequences:
        return math.ceil(sequences * lengths.sequence / train.micro_batch_tokens)
    if train.micro_batch_tokens:
        return math.ceil(sequences / max(1, train.micro_batch_tokens // lengths.sequence))
    return math.ceil(sequences / train.micro_batch_size)


def _bubble(config: RunConfig, lengths: work.Lengths) -> float:
    """How much longer a pipeline takes than its work."""
    count = micro_batches(config, lengths)
    return (config.parallel.pp_size - 1 + count) / count


def _exchange_s(config: RunConfig, rates: Rates, ranks_per_node: int) -> float:
    """Gradients reduced and parameters gathered in one optimizer step, on the slowest stage."""
    layout = config.parallel
    element = memory.MAIN_GRAD_BYTES + BYTES_PER_ELEMENT[config.policy.params]
    expert_dp = layout.world_size // (layout.etp_size * layout.ep_size * layout.pp_size)

    def seconds(elements: int, replicas: int, apart: int) -> float:
        link = rates.nic if apart * replicas > ranks_per_node else rates.nvlink
        return elements * element * (replicas - 1) / replicas / link

    def stage_s(stage: int) -> float:
        held = memory.trainer_elements(config, stage)
        dense = seconds(held.dense, layout.dp_size, layout.tp_size)
        return dense + seconds(held.expert, expert_dp, layout.etp_size * layout.ep_size)

    return max(stage_s(stage) for stage in {0, layout.pp_size - 1})


def _sync_s(moved: SyncBytes, rates: Rates, ranks_per_node: int) -> float:
    nic = moved.node_network / ranks_per_node
    return max(0.0, moved.rank_received - nic) / rates.nvlink + nic / rates.nic
