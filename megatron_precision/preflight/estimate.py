"""Estimates how long an iteration takes at given rates, and what a run costs. Nothing is measured.

Rollout
    A replica of the engine decodes B sequences at once, limited by `rollout.max_num_seqs`, its
    share of the requests, and its KV cache at the mean length. A step reads the weights and the
    keys and values of the B sequences, and computes; it takes the slower of the two, plus the
    host's time to launch the kernels. Of E experts with k a token, it reads the share
    1 - (1 - k / E)^B, those that at least one token is routed to. A rollout takes at least as long
    as its longest response alone.
Training
    Operations at a share of the peak rate, times the pipeline's bubble, (p - 1 + m) / m for m
    micro-batches (arXiv 2104.04473, section 2.2.1). Then gradients are reduced and parameters
    gathered over data parallelism, on the slowest link that a group spans, without overlap.
Sync
    The busiest rank's NVLink traffic and NIC traffic, one after the other, without waiting.

This module imports no torch.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from megatron_precision.checks.layout import kv_token_bytes
from megatron_precision.config.schema import RunConfig
from megatron_precision.layouts.vllm import padded_vocab_rows
from megatron_precision.precision.policy import BYTES_PER_ELEMENT
from megatron_precision.preflight import memory, work
from megatron_precision.preflight.wire import SyncBytes


@dataclass(frozen=True)
class Rates:
    """Rates of one GPU, in units of 1 and seconds.

    Attributes:
        flops: peak operations a second of dense products in the trainer's dtype.
        mfu: share of `flops` that training and prefill reach, with recomputation counted as work.
        hbm: bytes read from memory a second.
        hbm_share: share of `hbm` that decoding reaches.
        layer_launch_s: seconds in which the host launches one layer of a decoding step; 0 if CUDA
            graphs replay steps.
        nvlink, nic: bytes a second in one direction.
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
    """The estimated time of one iteration.

    Attributes:
        decoding: sequences that a replica decodes at once.
        decoding_limit: the setting or resource that limits `decoding`.
        decode_step_s: seconds of one decoding step.
        rollout_s, old_logprobs_s, training_s, exchange_s, sync_s: seconds of the phases;
            `exchange_s` is gradients and parameters over data parallelism, in all steps.
        longest_alone: whether the rollout takes as long as one response of the full length.
        rollout_tokens_per_s: tokens that the whole job samples a second.
        gpu_hours: GPU hours of the iteration.
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
        """The seconds of all phases, one after the other."""
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
    """Estimate the time of an iteration of a valid configuration.

    Args:
        done: the iteration's work at these lengths.
        moved: bytes that one weight sync moves.
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
    """Estimate the seconds of a decoding step: one token for each sequence of a replica.

    Args:
        sequences: number of sequences that the replica decodes at once.
        keys: mean number of tokens before the new one.
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
    cache = sequences * keys * kv_token_bytes(config)
    flops = 2 * work.active_weights(model) + work.attention_flops(model, keys)
    reading = (read * element + cache) / (rates.hbm * rates.hbm_share)
    computing = sequences * flops / (tp * rates.flops * rates.mfu)
    return max(reading, computing) + model.num_hidden_layers * rates.layer_launch_s


def _decoding(config: RunConfig, lengths: work.Lengths, done: work.Work) -> tuple[int, str]:
    """Return how many sequences the fullest replica decodes at once, and what limits them."""
    rollouts, replicas = config.train.rollouts_per_prompt, config.parallel.rollout_replicas
    prompts = math.ceil(done.sampled_sequences / rollouts / replicas)  # dealt by prompt
    tokens = config.rollout.kv_cache_mib * 2**20 / kv_token_bytes(config)
    bounds = {
        "rollout.max_num_seqs": config.rollout.max_num_seqs,
        "the requests": prompts * rollouts,
        "the KV cache": max(1, int(tokens / (lengths.prompt + lengths.response / 2))),
    }
    limit = min(bounds, key=lambda name: bounds[name])
    return bounds[limit], limit


def micro_batches(config: RunConfig, lengths: work.Lengths) -> int:
    """Return the number of micro-batches of a rank in an optimizer step, at the mean length."""
    train = config.train
    sequences = train.prompts_per_mini_batch * train.rollouts_per_prompt / config.parallel.dp_size
    if train.micro_batch_tokens and train.packed_sequences:
        return math.ceil(sequences * lengths.sequence / train.micro_batch_tokens)
    if train.micro_batch_tokens:
        return math.ceil(sequences / max(1, train.micro_batch_tokens // lengths.sequence))
    return math.ceil(sequences / train.micro_batch_size)


def _bubble(config: RunConfig, lengths: work.Lengths) -> float:
    """Return the factor by which the pipeline's bubble lengthens the work."""
    count = micro_batches(config, lengths)
    return (config.parallel.pp_size - 1 + count) / count


def _exchange_s(config: RunConfig, rates: Rates, ranks_per_node: int) -> float:
    """Estimate the seconds in which a step reduces gradients and gathers parameters.

    The slowest pipeline stage counts.
    """
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
