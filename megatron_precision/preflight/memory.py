"""Computes the memory of one rank from the configuration, by part and by phase of an iteration.

Trainer and engine run in one process, so their memory adds up. Parameters are counted from the
same tables that the weight sync reads (`layouts/megatron.py`, `layouts/vllm.py`). Everything else
is a formula with its source beside it; docs/preflight.md says which ones were measured.

An iteration is training → sync → rollout (`train/session.py`). By default trainer, engine and KV
cache stay on the GPU in all three phases. They share one caching allocator, which keeps memory
that a phase frees, possibly in pieces too small for the next phase. So all parts have to fit
together.

With `memory.engine_sleep` the engine releases its KV cache and weights while the trainer works: the
weights are back for the sync, the KV cache for the rollout. With `memory.offload_trainer`
parameters and optimizer are on the host and gradients are released while the engine samples. The
allocator gives this memory back to the device, so only the largest phase has to fit.

All sizes are bytes; a GB of a GPU is 1e9 bytes, as on its data sheet. This module imports no torch.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass
from typing import Literal

from megatron_precision.checks.layout import kv_token_bytes
from megatron_precision.config.schema import ModelConfig, RunConfig
from megatron_precision.layouts.architectures import architecture
from megatron_precision.layouts.megatron import megatron_parameters, padded_vocab_size
from megatron_precision.layouts.regions import round_up
from megatron_precision.layouts.vllm import padded_vocab_rows, vllm_parameters
from megatron_precision.platform.choice import Platform
from megatron_precision.precision.policy import BYTES_PER_ELEMENT

MAIN_GRAD_BYTES = 4  # gradients accumulate in FP32 in every policy
MOMENTS_BYTES = 8  # Adam's two moments, in FP32
MAIN_COPY_BYTES = 4  # an FP32 main copy, if the parameters are not FP32
# Bytes that `actor/logprobs.py` needs for one logit at its peak, beside the logit itself: FP32
# values, shifted values, their exponentials, and the softmax for the backward pass. Its kernels on
# a GPU need none of these.
LOGPROB_BYTES = {"cpu": 16, "cuda": 0}
# Tokens of the fullest expert-parallel rank, divided by the mean. An estimate: no auxiliary loss
# balances the router here, and the worst micro-batch decides whether a step fits. A rank that has
# all experts gets all tokens.
EXPERT_IMBALANCE = 2.0
# An estimate of what does not follow from the configuration: CUDA contexts and kernels of trainer
# and engine, NCCL's buffers, and fragmented memory.
RESERVE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Elements:
    """Number of parameters on one rank of the trainer.

    Attributes:
        dense: attention, norms, router, embeddings, dense MLP; reduced over data parallelism.
        expert: experts; reduced over expert data parallelism.
    """

    dense: int
    expert: int


@dataclass(frozen=True)
class Memory:
    """Bytes on one rank, by their use.

    Attributes:
        parameters, gradients, optimizer: the trainer's state; the optimizer is this rank's share,
            without the part on the host (`memory.optimizer_offload`).
        activations: kept by the micro-batches in flight, with recomputation taken into account.
        logits: LM head and log-probs of one micro-batch; only the last pipeline stage has them.
        engine_weights, kv_cache, engine_workspace: the engine's memory.
        sync_buffers: messages of the weight sync in flight.
        reserve: an estimate of everything that does not follow from the configuration.
    """

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    engine_weights: int
    kv_cache: int
    engine_workspace: int
    sync_buffers: int
    reserve: int = RESERVE_BYTES

    @property
    def total(self) -> int:
        """The sum of all parts: the peak if neither side is moved away while the other works."""
        return sum(getattr(self, part.name) for part in dataclasses.fields(self))


def of_run(config: RunConfig, platform: Platform = "cuda") -> Memory:
    """Compute the memory of the fullest rank of a valid configuration.

    Only the first and the last pipeline stage are compared: a stage between them has as many layers
    as the first, no embedding, and fewer micro-batches in flight.
    """
    ends = {0, config.parallel.pp_size - 1}
    return max((of_stage(config, stage, platform) for stage in ends), key=lambda m: m.total)


def of_trainer(config: RunConfig) -> int:
    """Compute the peak bytes of one rank of a trainer that has the GPU to itself."""
    parts = of_run(config)
    state = parts.parameters + parts.gradients + parts.optimizer
    return state + parts.activations + parts.logits


def of_stage(config: RunConfig, stage: int, platform: Platform = "cuda") -> Memory:
    """Compute the memory of a rank of one pipeline stage; all ranks of a stage are alike.

    Args:
        config: a valid configuration.
        stage: counted from 0.
        platform: the platform whose kernels run.
    """
    layout, policy = config.parallel, config.policy
    held = trainer_elements(config, stage)
    expert_dp = layout.world_size // (layout.etp_size * layout.ep_size * layout.pp_size)
    share = -(-held.dense // layout.dp_size) + -(-held.expert // expert_dp)
    main_copy = MAIN_COPY_BYTES if policy.params != "fp32" else 0
    return Memory(
        parameters=(held.dense + held.expert) * BYTES_PER_ELEMENT[policy.params],
        gradients=(held.dense + held.expert) * MAIN_GRAD_BYTES,
        optimizer=round(
            share * (MOMENTS_BYTES + main_copy) * (1 - config.memory.optimizer_offload)
        ),
        activations=_activations(config, stage, platform),
        logits=_logits(config, platform) if stage == layout.pp_size - 1 else 0,
        engine_weights=engine_elements(config) * BYTES_PER_ELEMENT[policy.rollout_params],
        kv_cache=config.rollout.kv_cache_mib * 2**20,
        engine_workspace=_engine_workspace(config),
        sync_buffers=2 * config.sync.batch_mib * 2**20,
    )


def trainer_elements(config: RunConfig, stage: int) -> Elements:
    """Count the parameters of a rank of the trainer, with the padded rows of its vocabulary."""
    model, layout = config.model, config.parallel
    first, last = stage == 0, stage == layout.pp_size - 1
    parts = _trainer_parts(model, layout.tp_size, layout.etp_size)
    layers = model.num_hidden_layers // layout.pp_size
    dense = parts.layer * layers + parts.embedding * first + parts.head * last
    if model.tie_word_embeddings and last and not first:
        dense += parts.embedding  # the last stage has its own copy
    return Elements(dense, parts.experts * layers // layout.ep_size)


@dataclass(frozen=True)
class _Parts:
    """Parameters of one tensor-parallel rank: one layer, all experts of a layer, and both ends."""

    layer: int
    experts: int
    embedding: int
    head: int


@functools.lru_cache(maxsize=256)
def _trainer_parts(model: ModelConfig, tp_size: int, etp_size: int) -> _Parts:
    rows = padded_vocab_size(model.vocab_size, tp_size) // tp_size
    one = dataclasses.replace(model, num_hidden_layers=1)
    layer = experts = embedding = head = 0
    for name, shape in megatron_parameters(one, rows, tp_size, etp_size):
        size = math.prod(shape)
        if ".experts." in name:
            experts += size
        elif name.startswith("decoder.layers."):
            layer += size
        elif name.startswith("embedding."):
            embedding += size
        else:
            head += size
    return _Parts(layer, experts, embedding, head)


def engine_elements(config: RunConfig) -> int:
    """Count the parameters of a rank of the engine, with the padded rows of its vocabulary."""
    return _engine_parts(config.model, config.parallel.rollout_tp_size)


@functools.lru_cache(maxsize=256)
def _engine_parts(model: ModelConfig, tp: int) -> int:
    one = dataclasses.replace(model, num_hidden_layers=1)
    return sum(
        math.prod(shape) * (model.num_hidden_layers if ".layers." in name else 1)
        for name, shape in vllm_parameters(one, tp, tp)
    )


def micro_batch_tokens(config: RunConfig) -> int:
    """Return the number of tokens, padding included, of the longest micro-batch a rank can get."""
    longest = round_up(config.max_sequence_tokens, config.width_multiple)
    return config.train.micro_batch_tokens or config.train.micro_batch_size * longest


def kv_sequences(config: RunConfig) -> float:
    """Return how many sequences of the full length fit into the KV cache of a replica."""
    return (
        config.rollout.kv_cache_mib * 2**20 / (kv_token_bytes(config) * config.max_sequence_tokens)
    )


def layer_activations(config: RunConfig, platform: Platform = "cuda") -> int:
    """Compute the bytes that one layer keeps for its backward pass, for one micro-batch.

    They are counted tensor by tensor as in Korthikanti et al. (arXiv 2205.05198, section 4), for
    the modules that `actor/models.py` builds: RMSNorms, grouped-query attention, a gated MLP, no
    biases. T is the number of tokens, h the hidden size, q and v the widths of queries and values,
    d the width of a head, I the width of the MLP, t TP, s = t with sequence parallelism and 1
    without, and e the bytes of an element. Megatron's own modules, with our RMSNorm in FP32, keep:

        two norms    T 2 (8 + e) h / s        wide, scaled, and rounded
        head norms   T 8 (q + v) / t          wide and scaled
        attention    e T (4q + 3v) / t        the fused projection, rotated q and k, the result
                                              as the kernel and as the next product has it
        residual     T 2 h / s                masks of two dropouts, of one byte
        MLP          e T 4 I / t              gate | up, SiLU of the gate, the product

    Transformer Engine's modules, whose norms keep no FP32, keep:

        two norms    e T 4 h / s              inputs and outputs
        attention    e T (3q + 3v) / t        the fused projection, rotated q and k, the result
        MLP          e T 3 I / t              gate | up, the product
                     e T 2 I / t              SiLU of the gate, and `up` again (Megatron adds 0
                                              to it): without `kernels.fused_activation`

    Both keep:

        rotation     e T 4 d                  cosines and sines, for q and for k
        experts      e T (2h + n I / etp) k etp / s, with k experts a token, I the width of an
                     expert and n the MLP's factor from above: tokens and results, for the rank
                     that gets most if EP > 1; and T 12 experts / s: FP32 router probabilities
        scores       T 8 heads L / t          FP32 softmax, rounded probabilities and mask, if
                                              attention writes its scores; L the longest sequence
    """
    model, layout = config.model, config.parallel
    element, tokens = BYTES_PER_ELEMENT[config.policy.params], micro_batch_tokens(config)
    tp, hidden = layout.tp_size, model.hidden_size
    shards = tp if layout.sequence_parallel else 1
    q = model.num_attention_heads * model.head_dim
    kv = model.num_key_value_heads * model.head_dim
    token = element * 4 * model.head_dim
    if _by_transformer_engine(config, platform):
        widths = 3 if config.kernels.fused_activation else 5  # of the MLP
        token += element * (4 * hidden // shards + 3 * (q + kv) // tp)
    else:
        widths = 4
        token += (2 * (8 + element) + 2) * hidden // shards + element * (4 * q + 3 * kv) // tp
        if architecture(model).qk_norm:
            token += 8 * (q + kv) // tp
    if architecture(model).experts:
        sent = 2 * hidden + widths * model.moe_intermediate_size // layout.etp_size
        copies: float = model.num_experts_per_tok * layout.etp_size
        if layout.ep_size > 1:
            copies *= EXPERT_IMBALANCE
        token += int(element * sent * copies) // shards + 12 * model.num_experts // shards
    else:
        token += element * widths * model.intermediate_size // tp
    if config.memory.attention == "scores" and config.policy.params != "fp32":
        token += 8 * model.num_attention_heads // tp * config.max_sequence_tokens
    return tokens * token


def _by_transformer_engine(config: RunConfig, platform: Platform) -> bool:
    """Whether the trainer uses Transformer Engine's modules (`actor/models.py`)."""
    if config.kernels.trainer == "auto":
        return platform == "cuda" and config.policy.params != "fp32"
    return config.kernels.trainer == "transformer_engine"


def _activations(config: RunConfig, stage: int, platform: Platform) -> int:
    """Compute the bytes of a stage's activations, for its micro-batches in flight.

    A stage has as many micro-batches in flight as there are stages from it to the last (1F1B). Full
    recomputation keeps the input of every layer, and all of the one layer that runs again. The
    layer in its backward pass also has gradients: at most as much as it kept.
    """
    layout = config.parallel
    layers = config.model.num_hidden_layers // layout.pp_size
    sequences = config.train.prompts_per_mini_batch * config.train.rollouts_per_prompt
    # Under a budget of tokens, every sequence may be so long that it is a micro-batch by itself.
    together = 1 if config.train.micro_batch_tokens else config.train.micro_batch_size
    micro_batches = -(-sequences // (layout.dp_size * together))
    under_way = min(layout.pp_size - stage, micro_batches)
    one = layer_activations(config, platform)
    if config.memory.recompute != "full":  # selective recomputation is counted as none
        return under_way * layers * one + one
    shards = layout.tp_size if layout.sequence_parallel else 1
    element = BYTES_PER_ELEMENT[config.policy.params]
    kept = element * micro_batch_tokens(config) * config.model.hidden_size // shards
    return under_way * layers * kept + 2 * one


def _logits(config: RunConfig, platform: Platform) -> int:
    """Compute the bytes of a micro-batch's logits and of their log-probs.

    On the CPU the log-probs need the responses' part of the logits and FP32 tensors; on a GPU the
    logits' gradient.
    """
    tp = config.parallel.tp_size
    columns = padded_vocab_size(config.model.vocab_size, tp) // tp
    element = BYTES_PER_ELEMENT[config.policy.lm_head]
    train = config.train
    alone = train.micro_batch_size == 1 and not train.micro_batch_tokens
    # More than one row is copied to put the batch first.
    copies = 2 if alone or train.packed_sequences else 3
    held = micro_batch_tokens(config) * columns * (copies * element + LOGPROB_BYTES[platform])
    if config.policy.lm_head != config.policy.params:
        hidden, divided = config.model.hidden_size, config.parallel.sequence_parallel
        held += 2 * element * columns * hidden  # the LM head's weight and its gradient
        # Hidden states in the LM head's dtype, their gradient, and the gathered hidden states.
        copies_of_shards = (1 / tp + 2) if divided else 2
        held += int(element * micro_batch_tokens(config) * hidden * copies_of_shards)
    return held


def _engine_workspace(config: RunConfig) -> int:
    """Estimate the bytes of an engine step: activations of one layer, and FP32 logits.

    vLLM itself measures them with a dummy run, unless it is given the size of the KV cache.
    """
    model, rollout, tp = config.model, config.rollout, config.parallel.rollout_tp_size
    element = BYTES_PER_ELEMENT[config.policy.rollout_params]
    wide = model.intermediate_size // tp
    if architecture(model).experts:
        per_expert = model.moe_intermediate_size // tp
        wide = model.num_experts_per_tok * (per_expert + model.hidden_size)
    step = rollout.max_num_batched_tokens * (4 * model.hidden_size + 3 * wide) * element
    return step + rollout.max_num_seqs * padded_vocab_rows(model) * 4 * 3


Phase = Literal["training", "sync", "rollout"]
PHASES: tuple[Phase, ...] = ("training", "sync", "rollout")
# used: the phase uses it. kept: it stays on the GPU unused. freed: the allocator keeps its memory
# for later. host: it is in host memory. gone: its memory is given back to the device.
State = Literal["used", "kept", "freed", "host", "gone"]
_AWAY = ("freed", "host", "gone")


def states(config: RunConfig) -> dict[str, dict[Phase, State]]:
    """Return the state of each part of `Memory` in each phase."""
    return {part: dict(zip(PHASES, row, strict=True)) for part, row in _states(config).items()}


def _states(config: RunConfig) -> dict[str, tuple[State, State, State]]:
    sent: State = "used" if config.policy.wire_source == "main_copies" else "kept"
    sleep, offload = config.memory.engine_sleep, config.memory.offload_trainer
    asleep: dict[str, State] = {"off": "kept", "keep_weights": "host", "drop_weights": "gone"}
    cache: State = "kept" if sleep == "off" else "gone"
    aside: State = "host" if offload else "kept"
    return {
        "parameters": ("used", "used", aside),
        "gradients": ("used", "kept", "gone" if offload else "kept"),
        "optimizer": ("used", sent, aside),
        "activations": ("used", "freed", "freed"),
        "logits": ("used", "freed", "freed"),
        "engine_weights": (asleep[sleep], "used", "used"),
        "kv_cache": (cache, cache, "used"),
        "engine_workspace": ("freed", "freed", "used"),
        "sync_buffers": ("kept", "used", "kept"),
        "reserve": ("used", "used", "used"),
    }


def totals(config: RunConfig, found: Memory) -> dict[Phase, int]:
    """Return the peak bytes in each phase, without memory that only the allocator keeps."""
    rows = states(config)
    return {
        phase: sum(
            getattr(found, part.name)
            for part in dataclasses.fields(found)
            if rows[part.name][phase] not in _AWAY
        )
        for phase in PHASES
    }


def needed(config: RunConfig, found: Memory) -> int:
    """Return the bytes that a rank needs: the largest phase if parts are moved away, else all."""
    return max(totals(config, found).values()) if _hands_over(config) else found.total


def _hands_over(config: RunConfig) -> bool:
    return config.memory.engine_sleep != "off" or config.memory.offload_trainer


def says(config: RunConfig) -> str:
    """Explain in words which parts have to fit together."""
    if _hands_over(config):
        return (
            "The largest phase has to fit: what a phase frees is given back before the other side "
            "takes memory. `host` parts wait in host memory, `gone` ones are made anew. What sleep "
            "gives back was measured (docs/results.md), a whole turn was not."
        )
    return (
        "All parts at once have to fit: nothing sleeps and nothing steps aside here "
        "(memory.engine_sleep, memory.offload_trainer), `kept` parts stay on the GPU, and of "
        "`freed` ones the allocator keeps the memory."
    )


def host_bytes(config: RunConfig, stage: int) -> int:
    """Return the peak bytes of pinned host memory that a rank needs for offloaded parts."""
    all_here = dataclasses.replace(config.memory, optimizer_offload=0.0)
    whole = of_stage(dataclasses.replace(config, memory=all_here), stage).optimizer
    found, rows = of_stage(config, stage), states(config)
    waiting: list[int] = [
        sum(getattr(found, part) for part, row in rows.items() if row[phase] == "host")
        for phase in PHASES
    ]
    return whole - found.optimizer + max(waiting)


def dump_copy_bytes(config: RunConfig, found: Memory, weights: int) -> int:
    """Return the bytes of host memory that a rank needs for a dump's weights.

    Args:
        weights: bytes of the whole model; above `train.dump_weights_gib` they are not dumped.
    """
    train = config.train
    dumps = train.dump_every > 0 or (train.dump_jump_factor > 0 and train.dump_jumps_at_most > 0)
    return found.parameters if dumps and weights <= train.dump_weights_gib * 2**30 else 0
