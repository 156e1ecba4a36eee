"""Memory of one rank, worked out from the configuration alone.

Trainer and engine live in one process, so that their memory adds up. Parameters are counted from
the tables that the weight sync reads (`weights/megatron_layout.py`, `weights/vllm_layout.py`), and
not by a formula. What a run allocates on top is a formula each, with its source beside it; the
docs say which were measured (docs/preflight.md).

Bytes throughout; a GB of a GPU is 1e9 bytes, as on its data sheet. This module imports no torch.

Which part of a rank's memory is where in which phase of an iteration.

An iteration goes training → sync → rollout (`train/hand_over.py`). By default nothing sleeps and
nothing is moved to host memory: trainer, engine and KV cache stay where they are, and only what a
pass needs comes and goes. Trainer and engine share one caching allocator, which keeps what a
phase frees and may have it in pieces that the next phase cannot use. So all parts at once count.

With `memory.engine_sleep` the engine gives its KV cache and weights back while the trainer works:
the weights are awake for the sync, the KV cache for the rollout alone. With
`memory.offload_trainer` parameters and optimizer are on the host, and gradients nowhere, while the
engine samples. Memory that is handed over has left the allocator: the largest phase counts.
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
MOMENTS_BYTES = 8  # Adam's two, in FP32
MAIN_COPY_BYTES = 4  # FP32, where the parameters are not
# What `actor/logprobs.py` holds of one logit at its peak, above the logit's own bytes: FP32
# values, shifted values, their exponentials, and the softmax that the backward pass needs. On a
# GPU its kernels hold none of these.
LOGPROB_BYTES = {"cpu": 16, "cuda": 0}
# Tokens that the fullest expert-parallel rank gets, over the mean: nothing balances the router
# here (no auxiliary loss), and a step dies with its worst micro-batch. An estimate. A rank that
# has all experts gets all tokens.
EXPERT_IMBALANCE = 2.0
# CUDA contexts and kernels of two engines, NCCL's buffers, and memory that allocators cut up: an
# estimate, since none of it follows from the configuration.
RESERVE_BYTES = 4 * 2**30


@dataclass(frozen=True)
class Elements:
    """Parameters of one trainer's rank.

    Attributes:
        dense: attention, norms, router, embeddings, dense MLP; reduced over data parallelism.
        expert: of its experts; reduced over expert data parallelism.
    """

    dense: int
    expert: int


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by what they are for.

    Attributes:
        parameters, gradients, optimizer: the trainer's; the optimizer's are this rank's share of
            what is not on the host (`memory.optimizer_offload`).
        activations: of the micro-batches under way, recomputation counted.
        logits: LM head and log-probs of one micro-batch; a last pipeline stage has them.
        engine_weights, kv_cache, engine_workspace: the engine's.
        sync_buffers: messages of the weight sync under way.
        reserve: what does not follow from the configuration.
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
        """All of it at once: nothing is moved away while the other side works."""
        return sum(getattr(self, part.name) for part in dataclasses.fields(self))


def of_run(config: RunConfig, platform: Platform = "cuda") -> Memory:
    """Memory of the fullest rank of a valid configuration.

    No stage between the first and the last has more than the first: it has as many layers, no
    embedding, and fewer micro-batches under way.
    """
    ends = {0, config.parallel.pp_size - 1}
    return max((of_stage(config, stage, platform) for stage in ends), key=lambda m: m.total)


def of_trainer(config: RunConfig) -> int:
    """Bytes of a trainer alone on a GPU, in its fullest moment; one rank."""
    parts = of_run(config)
    state = parts.parameters + parts.gradients + parts.optimizer
    return state + parts.activations + parts.logits


def of_stage(config: RunConfig, stage: int, platform: Platform = "cuda") -> Memory:
    """Memory of a rank of one pipeline stage; the ranks of a stage differ in nothing.

    Args:
        config: a valid configuration.
        stage: counted from 0.
        platform: whose kernels compute.
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
    """Parameters of a trainer's rank, the padded rows of its vocabulary included."""
    model, layout = config.model, config.parallel
    first, last = stage == 0, stage == layout.pp_size - 1
    parts = _trainer_parts(model, layout.tp_size, layout.etp_size)
    layers = model.num_hidden_layers // layout.pp_size
    dense = parts.layer * layers + parts.embedding * first + parts.head * last
    if model.tie_word_embeddings and last and not first:
        dense += parts.embedding  # the last stage has a copy of its own
    return Elements(dense, parts.experts * layers // layout.ep_size)


@dataclass(frozen=True)
class _Parts:
    """Parameters of one tensor-parallel rank: a layer's, all its experts', and both ends."""

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
    """Parameters of an engine's rank, the padded rows of its vocabulary included."""
    return _engine_parts(config.model, config.parallel.rollout_tp_size)


@functools.lru_cache(maxsize=256)
def _engine_parts(model: ModelConfig, tp: int) -> int:
    one = dataclasses.replace(model, num_hidden_layers=1)
    return sum(
        math.prod(shape) * (model.num_hidden_layers if ".layers." in name else 1)
        for name, shape in vllm_parameters(one, tp, tp)
    )


def micro_batch_tokens(config: RunConfig) -> int:
    """Tokens of the longest micro-batch that a rank may be given, padding included."""
    longest = round_up(config.max_sequence_tokens, config.width_multiple)
    return config.train.micro_batch_tokens or config.train.micro_batch_size * longest


def kv_sequences(config: RunConfig) -> float:
    """How many sequences of the full length the KV cache of a replica holds."""
    return (
        config.rollout.kv_cache_mib * 2**20 / (kv_token_bytes(config) * config.max_sequence_tokens)
    )


def layer_activations(config: RunConfig, platform: Platform = "cuda") -> int:
    """What the backward pass of one layer needs from its forward pass, for one micro-batch.

    Counted tensor by tensor as Korthikanti et al. count (arXiv 2205.05198, section 4), for the
    modules that `actor/models.py` builds: RMSNorms, grouped-query attention, a gated MLP, no
    biases. T tokens, h hidden, q and v the widths of queries and of values, d a head's, I the
    MLP's, t TP, s = t with sequence parallelism and 1 without, e bytes of an element. By
    Megatron's own modules, with our RMSNorm in FP32:

        two norms    T 2 (8 + e) h / s        wide, scaled, and rounded
        head norms   T 8 (q + v) / t          wide and scaled
        attention    e T (4q + 3v) / t        the fused projection, rotated q and k, the result
                                              as the kernel and as the next product has it
        residual     T 2 h / s                masks of two dropouts, of one byte
        MLP          e T 4 I / t              gate | up, SiLU of the gate, the product

    By Transformer Engine's, whose norms keep no FP32:

        two norms    e T 4 h / s              what goes in, and what comes out
        attention    e T (3q + 3v) / t        the fused projection, rotated q and k, the result
        MLP          e T 3 I / t              gate | up, the product
                     e T 2 I / t              SiLU of the gate, and `up` again (Megatron adds 0
                                              to it): without `kernels.fused_activation`

    By both:

        rotation     e T 4 d                  cosines and sines, for q and for k
        experts      e T (2h + n I / etp) k etp / s, n of the MLP's and an expert's width: tokens
                     and results, k a token, where EP > 1 for the rank that gets most; and
                     T 12 experts / s of FP32 router probabilities
        scores       T 8 heads L / t          where they are written: FP32 softmax, rounded
                                              probabilities, mask; L the longest sequence
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
    """Whether the trainer's modules are Transformer Engine's (`actor/models.py`)."""
    if config.kernels.trainer == "auto":
        return platform == "cuda" and config.policy.params != "fp32"
    return config.kernels.trainer == "transformer_engine"


def _activations(config: RunConfig, stage: int, platform: Platform) -> int:
    """Full recomputation keeps a layer's input alone, and one layer whole while it is run again.

    A stage has as many micro-batches under way as there are stages from it on (1F1B). The layer
    that is in its backward pass holds gradients beside what it kept: at most as much again.
    """
    layout = config.parallel
    layers = config.model.num_hidden_layers // layout.pp_size
    sequences = config.train.prompts_per_mini_batch * config.train.rollouts_per_prompt
    # Under a budget of tokens, the sequences may all be so long that each is alone.
    together = 1 if config.train.micro_batch_tokens else config.train.micro_batch_size
    micro_batches = -(-sequences // (layout.dp_size * together))
    under_way = min(layout.pp_size - stage, micro_batches)
    one = layer_activations(config, platform)
    if config.memory.recompute != "full":  # of a selective one nothing is taken off
        return under_way * layers * one + one
    shards = layout.tp_size if layout.sequence_parallel else 1
    element = BYTES_PER_ELEMENT[config.policy.params]
    kept = element * micro_batch_tokens(config) * config.model.hidden_size // shards
    return under_way * layers * kept + 2 * one


def _logits(config: RunConfig, platform: Platform) -> int:
    """Logits of a micro-batch, and what their log-probs take: on the CPU the responses' part and
    FP32 tensors, on a GPU their gradient."""
    tp = config.parallel.tp_size
    columns = padded_vocab_size(config.model.vocab_size, tp) // tp
    element = BYTES_PER_ELEMENT[config.policy.lm_head]
    train = config.train
    alone = train.micro_batch_size == 1 and not train.micro_batch_tokens
    # Batch first: a copy for more than one row.
    copies = 2 if alone or train.packed_sequences else 3
    held = micro_batch_tokens(config) * columns * (copies * element + LOGPROB_BYTES[platform])
    if config.policy.lm_head != config.policy.params:
        hidden, divided = config.model.hidden_size, config.parallel.sequence_parallel
        held += 2 * element * columns * hidden  # its weight, and the gradient
        # Hidden states as it has them, their gradient, and the gathered ones.
        copies_of_shards = (1 / tp + 2) if divided else 2
        held += int(element * micro_batch_tokens(config) * hidden * copies_of_shards)
    return held


def _engine_workspace(config: RunConfig) -> int:
    """One engine step: activations of its tokens in one layer, FP32 logits of its sequences.

    An estimate; vLLM measures its own by a dummy run where it is not given the cache's size.
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
# used: the phase works with it. kept: it stays and is not worked with. freed: its allocator has
# it, for whoever asks next. host: it is in the host's memory. gone: given back to the device.
State = Literal["used", "kept", "freed", "host", "gone"]
_AWAY = ("freed", "host", "gone")


def states(config: RunConfig) -> dict[str, dict[Phase, State]]:
    """Part of `Memory` → its state in each phase."""
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
    """Bytes that are allocated in each phase at most, what the allocator keeps left out."""
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
    """Bytes that a GPU must have for a rank: of the largest phase where parts are handed over."""
    return max(totals(config, found).values()) if _hands_over(config) else found.total


def _hands_over(config: RunConfig) -> bool:
    return config.memory.engine_sleep != "off" or config.memory.offload_trainer


def says(config: RunConfig) -> str:
    """What the states mean for what has to fit."""
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
    """Host memory of a rank for what lives or waits there, at most; it is pinned."""
    all_here = dataclasses.replace(config.memory, optimizer_offload=0.0)
    whole = of_stage(dataclasses.replace(config, memory=all_here), stage).optimizer
    found, rows = of_stage(config, stage), states(config)
    waiting: list[int] = [
        sum(getattr(found, part) for part, row in rows.items() if row[phase] == "host")
        for phase in PHASES
    ]
    return whole - found.optimizer + max(waiting)


def dump_copy_bytes(config: RunConfig, found: Memory, weights: int) -> int:
    """Host memory of a rank for the weights of a dump (`train.dump_weights_gib`).

    Args:
        weights: bytes of the whole model.
    """
    train = config.train
    dumps = train.dump_every > 0 or (train.dump_jump_factor > 0 and train.dump_jumps_at_most > 0)
    return found.parameters if dumps and weights <= train.dump_weights_gib * 2**30 else 0
