"""RunConfig and its parts: everything a run is, in one frozen tree.

A recipe is a function that returns a complete `RunConfig`; nothing is filled in later and no
validator edits it. This module imports neither torch nor an engine, so that a mistake is
reported within a second.

Lengths are in tokens, counts of rollouts and prompts are per iteration over the whole job.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_precision.precision.policy import PrecisionPolicy, WireSource, policy


@dataclass(frozen=True)
class ModelConfig:
    """A transformer, by the field names of Hugging Face's `config.json`.

    A dense model has `num_experts == 0`; an MoE model has experts in every layer. The default is
    a model that learns the arithmetic task within a minute: with a large model's initial weights
    (0.02) and rotary base (10000) it needed about twice the steps. A `rope_scaling_factor` other
    than 1 is Llama 3's scaling of the rotary frequencies.
    """

    model_type: Literal["qwen3", "qwen3_moe", "qwen2", "llama"] = "qwen3"
    vocab_size: int = 32
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    rope_theta: float = 500.0
    rope_scaling_factor: float = 1.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: float = 0.06
    max_position_embeddings: int = 256
    num_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    norm_topk_prob: bool = True


@dataclass(frozen=True)
class ParallelConfig:
    """Trainer and rollout layout of one colocated `torchrun` world.

    The data-parallel size is what is left: world_size / (tp_size * pp_size). Experts see their
    own grid: world_size / (etp_size * ep_size * pp_size) expert-data-parallel replicas.
    `cp_size` is here to be refused: a sequence is not divided over ranks by its tokens.
    """

    world_size: int = 2
    tp_size: int = 2
    pp_size: int = 1
    ep_size: int = 1
    etp_size: int = 1
    sequence_parallel: bool = False
    rollout_tp_size: int = 2
    cp_size: int = 1

    @property
    def dp_size(self) -> int:
        """Trainer replicas of the dense parameters."""
        return self.world_size // (self.tp_size * self.pp_size)

    @property
    def rollout_replicas(self) -> int:
        """Engine replicas; each samples its own share of an iteration's rollouts."""
        return self.world_size // self.rollout_tp_size


# What a response earns that reached its limit before an end token.
Truncated = Literal["wrong", "graded"]


@dataclass(frozen=True)
class TaskConfig:
    """Where prompts come from and how an answer is scored.

    arithmetic: made up here. `train_questions` are drawn for the perfectible set,
        `eval_questions` are held out. `difficulty` is the number of terms of a sum; 8 make a
        response of about 61 tokens.
    chat: files of chat prompts (`data/prompts.py`), `NAME=PATH` or `NAME=PATH@WEIGHT` each, with
        the start's tokenizer and chat template. `scorer` is a name in `rewards/scorers.py` or
        `MODULE:FUNCTION`; it runs in `scorer_workers` processes a replica of the engine, with
        a limit of time for each response.

    Prompts of more than `max_prompt_tokens` are dropped and counted. A truncated response of a
    training rollout has the reward 0 whatever it says, as in the code of the paper's authors, or
    is graded as it stands; in an evaluation it always is.
    """

    name: Literal["arithmetic", "chat"] = "arithmetic"
    max_prompt_tokens: int = 32
    difficulty: int = 8
    train_questions: int = 512
    eval_questions: int = 64
    train_sets: tuple[str, ...] = ()
    eval_sets: tuple[str, ...] = ()
    scorer: str = "math"
    scorer_workers: int = 2
    scorer_time_limit_s: float = 10.0
    truncated: Truncated = "wrong"


@dataclass(frozen=True)
class StartConfig:
    """Where the first weights come from.

    warm_start: a supervised start, made once and cached by its fingerprint.
    checkpoint: the Hugging Face folder `checkpoint`, with its tokenizer. A recipe leaves the
        folder empty, for the user to name, and says in `public_name` which model it means.
    """

    kind: Literal["warm_start", "checkpoint"] = "warm_start"
    checkpoint: str = ""
    public_name: str = ""


@dataclass(frozen=True)
class WarmStartConfig:
    """The supervised start that the RL runs share, made once and cached by its fingerprint.

    Accuracy is sampled every `check_every` steps. It stays near 10 % for some 180 steps of the
    default model and then climbs through the target window in some 60.
    """

    learning_rate: float = 2e-3
    batch_size: int = 32
    micro_batch_size: int = 32
    max_steps: int = 600
    warmup_steps: int = 50
    check_every: int = 40
    target_accuracy_low: float = 0.40
    target_accuracy_high: float = 0.60
    check_questions: int = 128
    check_samples: int = 2


@dataclass(frozen=True)
class PerfectibleConfig:
    """The perfectible set: questions the start answers sometimes, as the paper builds it.

    Accuracy bounds are inclusive.
    """

    samples_per_question: int = 40
    accuracy_low: float = 0.20
    accuracy_high: float = 0.80


# In the place of an expert: no choice is known. The last token of a response passes through no
# layer, and what a prefix cache remembers is not computed again.
UNKNOWN_EXPERT = 255


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling in training rollouts.

    top_p, top_k and the penalty are here to be refused: any value but the neutral one makes the
    engine's log-probs those of another distribution than the one the trainer differentiates.
    `record_routing` keeps the experts that an MoE engine chose for every token, to compare them
    with the trainer's (`mismatch/router_flip_share`).
    """

    max_response_tokens: int = 96
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    repetition_penalty: float = 1.0
    max_num_seqs: int = 512
    max_num_batched_tokens: int = 16384
    kv_cache_mib: int = 256
    prefix_caching: bool = False
    record_routing: bool = True


@dataclass(frozen=True)
class SyncConfig:
    """The weight sync: what is sent, and how much is under way at once (and held, each way)."""

    wire_source: WireSource = "parameters"
    batch_mib: int = 64


@dataclass(frozen=True)
class AlgorithmConfig:
    """An algorithm by its name in `rl/algorithms.py`, and the constants of the parts.

    A part reads its own constants and no others, so each has its source's value at the same time:

        clip_low, clip_high              PPO: the ratio stays in [1 - low, 1 + high]
        dual_clip                        PPO: bound c on the ratio where A < 0; 0 is none
        sequence_clip_low, _high         GSPO: the same for the ratio of a sequence
        correction_threshold             C of TIS and MIS
        token_mask_low, _high            IcePop: tokens with pi/mu outside are left out
        log_weight_clamp                 log-weights are cut here before exp
        overlong_buffer_share            DAPO: share of the response limit in which the penalty
                                         grows from 0 to its full size; 0.2 is 4,096 of 20,480
        overlong_penalty                 DAPO: its full size, in units of reward
        dynamic_sampling_rounds          DAPO: how often an iteration asks further prompts at most
    """

    name: str = "PG-Seq-IS"
    clip_low: float = 0.2
    clip_high: float = 0.28
    dual_clip: float = 0.0
    sequence_clip_low: float = 3e-4
    sequence_clip_high: float = 4e-4
    correction_threshold: float = 3.0
    token_mask_low: float = 0.5
    token_mask_high: float = 5.0
    log_weight_clamp: float = 20.0
    overlong_buffer_share: float = 0.2
    overlong_penalty: float = 1.0
    dynamic_sampling_rounds: int = 4


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, constant learning rate after a linear warm-up; skipped steps do not count."""

    learning_rate: float = 1e-6
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-15
    weight_decay: float = 0.0
    clip_grad: float = 1.0
    warmup_steps: int = 0


@dataclass(frozen=True)
class LossScaleConfig:
    """The dynamic loss scale of an FP16 trainer; ignored where the policy needs none.

    An FP16 trainer whose scale is at `min_scale` and still overflows, or another one that
    overflows, is given up after `hopeless_overflows` steps in a row.

    `initial` says where it starts:
        calibrated   at the largest power of two whose first mini-batch stays finite, less
                     `headroom_bits`;
        authors      as the paper's authors do: at 2^16, with growth every 400 steps, whatever
                     `initial_scale` and `growth_interval` say;
        fixed_start  at `initial_scale`.
    """

    initial: Literal["calibrated", "authors", "fixed_start"] = "calibrated"
    initial_scale: float = 2.0**16
    headroom_bits: int = 3
    growth_interval: int = 400
    hysteresis: int = 1
    min_scale: float = 1.0
    hopeless_overflows: int = 20

    @property
    def starting_scale(self) -> float:
        """The scale before any step; calibration moves it."""
        return 2.0**16 if self.initial == "authors" else self.initial_scale

    @property
    def good_steps_to_grow(self) -> int:
        """Good steps in a row that double the scale."""
        return 400 if self.initial == "authors" else self.growth_interval


@dataclass(frozen=True)
class TrainConfig:
    """The shape of an iteration, and how many there are.

    `mismatch_every` forces a forward-only pass every so many iterations for algorithms that need
    none; at 0 their mismatch is measured on the step before the first update alone.
    `micro_batch_size` is in sequences of one rank: fewer fit a CPU's caches better, more take fewer
    collectives. `micro_batch_tokens` is a budget instead, in padded tokens of one micro-batch of
    one rank: at 0 there is none, else it decides alone (for responses of unlike lengths).
    `packed_sequences` lays the sequences of a micro-batch end to end, without padding between them
    (`actor/token_layout.py`).

    `routing_replay` makes the trainer's routers take the experts that the engine chose (R3).

    An iteration is dumped (`replay/dump.py`) every `dump_every` iterations (0: never), and by
    itself where its mismatch or a gradient norm is above `dump_jump_factor` × the running median
    (0: never), `dump_jumps_at_most` times a run. Its weights are written beside it where the
    model takes no more than `dump_weights_gib`; each rank then keeps a copy of its own shard in
    host memory, and gathers the whole model to write it.
    """

    iterations: int = 40
    prompts_per_iteration: int = 64
    rollouts_per_prompt: int = 8
    prompts_per_mini_batch: int = 16
    micro_batch_size: int = 64
    micro_batch_tokens: int = 0
    packed_sequences: bool = False
    mismatch_every: int = 0
    routing_replay: bool = False
    dump_every: int = 0
    dump_jump_factor: float = 5.0
    dump_jumps_at_most: int = 4
    dump_weights_gib: float = 1.0

    @property
    def steps_per_iteration(self) -> int:
        """Optimizer steps an iteration."""
        return self.prompts_per_iteration // self.prompts_per_mini_batch


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out questions: before the first iteration, every `every`, at the end.

    Its sampling is its own: no log-prob of it is used, so that any `top_p` will do.
    """

    every: int = 5
    samples_per_question: int = 4
    temperature: float = 0.6
    top_p: float = 1.0


# The parts of a layer that Megatron Core 0.16.1 can run again, of those that our models have.
RECOMPUTE_MODULES = ("core_attn", "layernorm", "mlp", "moe", "moe_act")


@dataclass(frozen=True)
class MemoryConfig:
    """What the trainer keeps, and where; and what steps aside while the other side works.

    recompute: `full` keeps the input of each layer and runs the layer again; `selective` runs the
        parts of a layer again that `recompute_modules` names.
    attention: of FP16 and BF16. `scores` writes them to memory, where the rounding of the unfused
        kernels is studied; `fused` is PyTorch's or Transformer Engine's kernel, whose memory grows
        with the tokens and not with their square. Without Transformer Engine FP32 is always fused.

    On GPUs alone:

    optimizer_offload: share of the optimizer's state that lives, and is updated, on the host.
    engine_sleep: what the engine gives back while the trainer works. `keep_weights` moves them to
        the host, `drop_weights` forgets them: the sync that follows brings all of them again. Its
        KV cache is given back either way.
    offload_trainer: gradients and optimizer state are on the host while the engine samples.
    """

    recompute: Literal["none", "selective", "full"] = "none"
    recompute_modules: tuple[str, ...] = ("core_attn",)
    attention: Literal["scores", "fused"] = "scores"
    optimizer_offload: float = 0.0
    engine_sleep: Literal["off", "keep_weights", "drop_weights"] = "off"
    offload_trainer: bool = False


# Switches of `KernelConfig` that Megatron's own modules have not.
TRANSFORMER_ENGINE_FUSIONS = ("fused_rope", "fused_permute", "fused_weight_gradients")


@dataclass(frozen=True)
class KernelConfig:
    """Which kernels compute; each fusion by itself, so that what it does to the mismatch shows.

    trainer: Megatron's own modules, or Transformer Engine's (fused norms, its attention, grouped
        experts); `auto` is the latter on CUDA and the former on the CPU.
    fused_rope, fused_permute: Transformer Engine's kernels for rotary embeddings, and for the order
        of tokens among experts.
    fused_activation: SwiGLU of the trainer as one function.
    fused_weight_gradients: Transformer Engine's products add a weight's gradient to the FP32 buffer
        themselves; it is never rounded to 16 bits on its way.
    fp32_lm_head: both sides multiply the last hidden states with the output weights in FP32.
    cuda_graphs: the engine's steps are replayed. Nothing of the engine is watched then: neither
        the range of its activations nor the experts that it chooses.
    """

    trainer: Literal["auto", "local", "transformer_engine"] = "auto"
    fused_rope: bool = False
    fused_permute: bool = False
    fused_activation: bool = False
    fused_weight_gradients: bool = False
    fp32_lm_head: bool = False
    cuda_graphs: bool = False
    cascade_attention: bool = False


@dataclass(frozen=True)
class CheckpointConfig:
    """Checkpoints to resume from (docs/reliability.md).

    One is written after every `every` iterations (0: none), after the last, and where a signal
    asks for it. The last `keep` stay, and the one whose own evaluation was the best.
    `background` writes them in a process of its own while training goes on.
    """

    every: int = 0
    keep: int = 2
    background: bool = True


@dataclass(frozen=True)
class WatchdogConfig:
    """Seconds that a phase may take before the job is ended as hung; 0: no limit.

    A phase contains the waiting for the slowest rank. `other` is what lies between the phases,
    `start` the time until the first of them.
    """

    start_s: float = 7200.0
    rollout_s: float = 14400.0
    old_logprobs_s: float = 7200.0
    train_s: float = 7200.0
    sync_s: float = 1800.0
    evaluation_s: float = 14400.0
    checkpoint_s: float = 3600.0
    other_s: float = 3600.0

    def limits(self) -> dict[str, float]:
        """By the name of the phase."""
        return {name.removesuffix("_s"): value for name, value in dataclasses.asdict(self).items()}


@dataclass(frozen=True)
class SinkConfig:
    """Who else reads the metrics events, besides `metrics.jsonl` and the console."""

    wandb: Literal["off", "offline", "online"] = "off"
    tensorboard: bool = False


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run. Recipes that differ in precision differ in nothing else."""

    recipe: str
    precision: str = "fp16"
    seed: int = 42
    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    start: StartConfig = field(default_factory=StartConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    perfectible: PerfectibleConfig = field(default_factory=PerfectibleConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    sync: SyncConfig = field(default_factory=SyncConfig)
    algo: AlgorithmConfig = field(default_factory=AlgorithmConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss_scale: LossScaleConfig = field(default_factory=LossScaleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    sinks: SinkConfig = field(default_factory=SinkConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    kernels: KernelConfig = field(default_factory=KernelConfig)

    @property
    def policy(self) -> PrecisionPolicy:
        """The precision policy that `precision` names, with what is set apart from it."""
        return policy(self.precision, self.sync.wire_source, self.kernels.fp32_lm_head)

    @property
    def records_routing(self) -> bool:
        """Whether rollouts carry the experts that the engine's routers chose."""
        return self.model.num_experts > 0 and self.rollout.record_routing

    @property
    def max_sequence_tokens(self) -> int:
        """The longest prompt plus the longest response."""
        return self.task.max_prompt_tokens + self.rollout.max_response_tokens

    @property
    def width_multiple(self) -> int:
        """Padded widths of the trainer's micro-batches are multiples of this.

        Sequence parallelism divides them. oneDNN compiles a kernel for each shape of a 16-bit
        product: few widths, few kernels.
        """
        return math.lcm(1 if self.policy.params == "fp32" else 8, self.parallel.tp_size)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The config as the plain values of JSON, for `config.json` and for a dry run."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values


def fingerprint(parts: Any) -> str:
    """Twelve hex digits that name a piece of configuration; equal values give equal names."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
