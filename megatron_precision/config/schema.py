"""Defines `RunConfig` and its sections: everything that a run is, in one frozen tree.

A recipe is a function that returns a complete `RunConfig`; nothing is filled in later and no
validator edits it. The bounds of a setting stand at its field (`bounds.py`). This module imports
neither torch nor an engine, so that a mistake is reported within a second.

Lengths are in tokens. Counts of rollouts and prompts are per iteration, over the whole job.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from megatron_precision.config.bounds import (
    Amount,
    ClipLow,
    Count,
    Decay,
    FactorOrOff,
    Positive,
    PositiveShare,
    Share,
    Size,
    WeightFloor,
    WeightLimit,
)
from megatron_precision.precision.policy import PrecisionPolicy, WireSource, policy


@dataclass(frozen=True)
class ModelConfig:
    """A transformer, with the field names of Hugging Face's `config.json`.

    The default model learns the arithmetic task within a minute; with a large model's initial
    weights (0.02) and rotary base (10000) it needed about twice the steps.

    Attributes:
        rope_scaling_factor: Llama 3's scaling of the rotary frequencies; 1 for none.
        num_experts: 0 for a dense model; an MoE model has experts in every layer.
    """

    model_type: Literal["qwen3", "qwen3_moe", "qwen2", "llama"] = "qwen3"
    vocab_size: Size = 32
    hidden_size: Size = 128
    intermediate_size: Size = 384
    num_hidden_layers: Size = 2
    num_attention_heads: Size = 4
    num_key_value_heads: Size = 2
    head_dim: Size = 32
    rope_theta: Positive = 500.0
    rope_scaling_factor: Positive = 1.0
    rms_norm_eps: Positive = 1e-6
    tie_word_embeddings: bool = False
    initializer_range: Positive = 0.06
    max_position_embeddings: Size = 256
    num_experts: Count = 0
    num_experts_per_tok: Count = 0
    moe_intermediate_size: Count = 0
    norm_topk_prob: bool = True


@dataclass(frozen=True)
class ParallelConfig:
    """The layouts of trainer and engine in one colocated `torchrun` world.

    The data-parallel size is world_size / (tp_size * pp_size). Experts have a grid of their own:
    world_size / (etp_size * ep_size * pp_size) expert-data-parallel replicas.

    Attributes:
        world_size: ranks, one per GPU.
        tp_size, pp_size: the trainer's tensor- and pipeline-parallel sizes.
        ep_size, etp_size: expert-parallel size, and the tensor-parallel size of experts.
        sequence_parallel: divides norms and residuals over the tensor-parallel ranks.
        rollout_tp_size: the engine's tensor-parallel size.
    """

    world_size: Size = 2
    tp_size: Size = 2
    pp_size: Size = 1
    ep_size: Size = 1
    etp_size: Size = 1
    sequence_parallel: bool = False
    rollout_tp_size: Size = 2

    @property
    def dp_size(self) -> int:
        """The number of trainer replicas of the dense parameters."""
        return self.world_size // (self.tp_size * self.pp_size)

    @property
    def rollout_replicas(self) -> int:
        """The number of engine replicas; each samples its share of an iteration's rollouts."""
        return self.world_size // self.rollout_tp_size


# The treatment of a response that reached its limit before an end token.
Truncated = Literal["wrong", "graded"]


@dataclass(frozen=True)
class TaskConfig:
    """Where prompts come from, and how an answer is scored.

    Attributes:
        name: `arithmetic` makes sums up; `chat` reads files of chat prompts (`data/prompts.py`),
            with the tokenizer and chat template of the start.
        max_prompt_tokens: longer prompts are dropped and counted.
        difficulty: arithmetic: terms of a sum; 8 make a response of about 61 tokens.
        train_questions: arithmetic: questions drawn for the perfectible set.
        eval_questions: arithmetic: questions held out.
        train_sets, eval_sets: chat: `NAME=PATH` or `NAME=PATH@WEIGHT` each.
        scorer: a name in `rewards/scorers.py`, or `MODULE:FUNCTION`.
        scorer_workers: processes that score, per engine replica.
        scorer_time_limit_s: seconds that a response may take to score.
        truncated: the treatment of truncated training responses: `wrong` gives the reward 0, as
            the code of the paper's authors does, `graded` grades them. An evaluation always does.
    """

    name: Literal["arithmetic", "chat"] = "arithmetic"
    max_prompt_tokens: Size = 32
    difficulty: Size = 8
    train_questions: Size = 512
    eval_questions: Count = 64
    train_sets: tuple[str, ...] = ()
    eval_sets: tuple[str, ...] = ()
    scorer: str = "math"
    scorer_workers: Size = 2
    scorer_time_limit_s: Positive = 10.0
    truncated: Truncated = "wrong"


@dataclass(frozen=True)
class StartConfig:
    """Where the first weights come from.

    Attributes:
        kind: `warm_start` is a supervised start, made once and cached by its fingerprint;
            `checkpoint` is a Hugging Face folder with its tokenizer.
        checkpoint: that folder; a recipe leaves it empty for the user to name.
        public_name: the model that a recipe means.
    """

    kind: Literal["warm_start", "checkpoint"] = "warm_start"
    checkpoint: str = ""
    public_name: str = ""


@dataclass(frozen=True)
class WarmStartConfig:
    """The supervised start that RL runs share.

    The accuracy of the default model stays near 10 % for about 180 steps and then climbs through
    the target window within about 60.

    Attributes:
        check_every: steps between two measurements of the accuracy.
        target_accuracy_low, target_accuracy_high: training stops in this window.
        check_questions, check_samples: questions of a measurement, and samples of each.
    """

    learning_rate: Positive = 2e-3
    batch_size: Size = 32
    micro_batch_size: Size = 32
    max_steps: Count = 600
    warmup_steps: Count = 50
    check_every: Size = 40
    target_accuracy_low: Share = 0.40
    target_accuracy_high: Share = 0.60
    check_questions: Size = 128
    check_samples: Size = 2


@dataclass(frozen=True)
class PerfectibleConfig:
    """The perfectible set: the questions that the start answers sometimes, as in the paper.

    Attributes:
        samples_per_question: responses sampled per question.
        accuracy_low, accuracy_high: a question is kept within these bounds, both inclusive.
    """

    samples_per_question: Size = 40
    accuracy_low: Share = 0.20
    accuracy_high: Share = 0.80


# Stands for an expert where the engine's choice is unknown: the last token of a response passes
# through no layer, and a prefix cache does not compute its tokens again.
UNKNOWN_EXPERT = 255


@dataclass(frozen=True)
class RolloutConfig:
    """Sampling in training rollouts.

    Attributes:
        temperature: of sampling; the trainer's log-probs are taken at it too.
        max_num_seqs, max_num_batched_tokens: vLLM's limits of one engine step.
        kv_cache_mib: the KV cache of a rank.
        prefix_caching: vLLM's prefix cache.
        record_routing: keeps the experts that an MoE engine chose for every token, to compare
            them with the trainer's (`mismatch/router_flip_share`).
    """

    max_response_tokens: Size = 96
    temperature: Positive = 1.0
    max_num_seqs: Size = 512
    max_num_batched_tokens: Size = 16384
    kv_cache_mib: Size = 256
    prefix_caching: bool = False
    record_routing: bool = True


@dataclass(frozen=True)
class SyncConfig:
    """The weight sync.

    Attributes:
        wire_source: sends the trainer's `parameters`, or the optimizer's FP32 `main_copies`.
        batch_mib: the largest message, and the size of each of two buffers.
    """

    wire_source: WireSource = "parameters"
    batch_mib: Size = 64


@dataclass(frozen=True)
class AlgorithmConfig:
    """An algorithm by its name in `rl/algorithms.py`, and the constants of its parts.

    Each part reads its own constants alone, so all have their source's value at the same time.

    Attributes:
        clip_low, clip_high: PPO: the ratio stays in [1 - low, 1 + high].
        dual_clip: PPO: bound c on the ratio where A < 0; 0 for none.
        sequence_clip_low, sequence_clip_high: GSPO: the same for the ratio of a sequence.
        correction_threshold: C of TIS and MIS.
        token_mask_low, token_mask_high: IcePop: tokens with pi/mu outside are masked.
        log_weight_clamp: log-weights are cut here before exp.
        overlong_buffer_share: DAPO: share of the response limit over which the penalty grows to
            its full size; 0.2 is 4,096 of 20,480.
        overlong_penalty: DAPO: the full penalty, in units of reward.
        dynamic_sampling_rounds: DAPO: the largest number of further rounds per iteration.
    """

    name: str = "PG-Seq-IS"
    clip_low: ClipLow = 0.2
    clip_high: Positive = 0.28
    dual_clip: FactorOrOff = 0.0
    sequence_clip_low: ClipLow = 3e-4
    sequence_clip_high: Positive = 4e-4
    correction_threshold: WeightLimit = 3.0
    token_mask_low: WeightFloor = 0.5
    token_mask_high: WeightLimit = 5.0
    log_weight_clamp: Positive = 20.0
    overlong_buffer_share: PositiveShare = 0.2
    overlong_penalty: Amount = 1.0
    dynamic_sampling_rounds: Count = 4


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, with a constant learning rate after a linear warm-up.

    Attributes:
        clip_grad: the largest gradient norm; 0 for no clipping.
        warmup_steps: applied steps; skipped steps do not count.
    """

    learning_rate: Positive = 1e-6
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    eps: Positive = 1e-15
    weight_decay: Amount = 0.0
    clip_grad: Amount = 1.0
    warmup_steps: Count = 0


@dataclass(frozen=True)
class LossScaleConfig:
    """The dynamic loss scale of an FP16 trainer; ignored where the policy needs none.

    Attributes:
        initial: `calibrated` starts at the largest power of two whose first mini-batch stays
            finite, less `headroom_bits`; `authors` starts at 2^16 and grows every 400 steps, as
            the paper's authors do; `fixed_start` starts at `initial_scale`.
        growth_interval: good steps in a row that double the scale.
        hysteresis: overflows in a row that halve it.
        hopeless_overflows: a run ends after so many overflows in a row at `min_scale`, or, with
            no loss scale, after so many at all.
    """

    initial: Literal["calibrated", "authors", "fixed_start"] = "calibrated"
    initial_scale: float = 2.0**16
    headroom_bits: Count = 3
    growth_interval: Size = 400
    hysteresis: Size = 1
    min_scale: float = 1.0
    hopeless_overflows: Size = 20

    @property
    def starting_scale(self) -> float:
        """The scale before any step; calibration moves it."""
        return 2.0**16 if self.initial == "authors" else self.initial_scale

    @property
    def good_steps_to_grow(self) -> int:
        """The number of good steps in a row that double the scale."""
        return 400 if self.initial == "authors" else self.growth_interval


@dataclass(frozen=True)
class TrainConfig:
    """The shape of an iteration, and the number of iterations.

    Attributes:
        micro_batch_size: sequences of one rank; fewer fit a CPU's caches better, more need fewer
            collectives.
        micro_batch_tokens: a budget instead, in padded tokens of one micro-batch of one rank; 0
            for none.
        packed_sequences: puts the sequences of a micro-batch end to end, without padding.
        mismatch_every: runs a forward pass every so many iterations for algorithms that need
            none; at 0 their mismatch is measured on the first step alone.
        routing_replay: the trainer's routers take the experts that the engine chose (R3).
        dump_every: dumps every so many iterations (`observe/dump.py`); 0 for never.
        dump_jump_factor: dumps when the mismatch or a gradient norm exceeds this factor times
            its running median; 0 for never.
        dump_jumps_at_most: the largest number of such dumps in a run.
        dump_weights_gib: writes the weights beside a dump if the model takes no more; each rank
            then keeps a copy of its shard in host memory, and gathers the model to write it.
    """

    iterations: Count = 40
    prompts_per_iteration: Size = 64
    rollouts_per_prompt: Size = 8
    prompts_per_mini_batch: Size = 16
    micro_batch_size: Size = 64
    micro_batch_tokens: Count = 0
    packed_sequences: bool = False
    mismatch_every: Count = 0
    routing_replay: bool = False
    dump_every: Count = 0
    dump_jump_factor: FactorOrOff = 5.0
    dump_jumps_at_most: Count = 4
    dump_weights_gib: Amount = 1.0

    @property
    def steps_per_iteration(self) -> int:
        """The number of optimizer steps per iteration."""
        return self.prompts_per_iteration // self.prompts_per_mini_batch


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation on held-out questions: before the first iteration, every `every`, at the end.

    No log-prob of it is used, so it may sample with any `top_p`.
    """

    every: Count = 5
    samples_per_question: Size = 4
    temperature: Amount = 0.6
    top_p: PositiveShare = 1.0


# The parts of our models' layers that Megatron Core 0.16.1 can recompute.
RECOMPUTE_MODULES = ("core_attn", "layernorm", "mlp", "moe", "moe_act")


@dataclass(frozen=True)
class MemoryConfig:
    """What the trainer keeps in memory, and what is offloaded while the other side works.

    Attributes:
        recompute: `full` keeps the input of each layer and recomputes the rest; `selective`
            recomputes the parts of a layer that `recompute_modules` names.
        attention: FP16 and BF16: `scores` writes the scores to memory, which shows the rounding
            of unfused kernels; `fused` is PyTorch's or Transformer Engine's kernel, whose memory
            grows linearly with the tokens. Without Transformer Engine, FP32 is always fused.
        optimizer_offload: GPUs: the share of the optimizer's state that is kept and updated on
            the host.
        engine_sleep: GPUs: what the engine frees while the trainer works, besides its KV cache:
            `keep_weights` moves its weights to the host, `drop_weights` drops them, and the next
            sync brings them back.
        offload_trainer: GPUs: gradients and optimizer state are on the host while the engine
            samples.
    """

    recompute: Literal["none", "selective", "full"] = "none"
    recompute_modules: tuple[str, ...] = ("core_attn",)
    attention: Literal["scores", "fused"] = "scores"
    optimizer_offload: Share = 0.0
    engine_sleep: Literal["off", "keep_weights", "drop_weights"] = "off"
    offload_trainer: bool = False


# Switches of `KernelConfig` that need Transformer Engine.
TRANSFORMER_ENGINE_FUSIONS = ("fused_rope", "fused_permute", "fused_weight_gradients")


@dataclass(frozen=True)
class KernelConfig:
    """Which kernels compute. Each fusion has its own switch, to see its effect on the mismatch.

    Attributes:
        trainer: `local` is Megatron's own modules; `transformer_engine` has fused norms, its own
            attention and grouped experts; `auto` is the latter on CUDA, the former on the CPU.
        fused_rope: Transformer Engine's rotary embeddings.
        fused_permute: Transformer Engine's sorting of tokens by expert.
        fused_activation: the trainer's SwiGLU as one function.
        fused_weight_gradients: Transformer Engine's products add a weight's gradient to the FP32
            buffer, without rounding it to 16 bits first.
        fp32_lm_head: both sides multiply the last hidden states with the output weights in FP32.
        cuda_graphs: the engine's steps are replayed; the range of its activations and its
            choice of experts are not watched then.
        cascade_attention: vLLM's cascade attention, which rounds differently.
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

    Attributes:
        every: iterations between two checkpoints; 0 for only the last, and where a signal asks.
        keep: the number of checkpoints kept, besides the one with the best evaluation.
        background: writes them in another process while training continues.
    """

    every: Count = 0
    keep: Size = 2
    background: bool = True


@dataclass(frozen=True)
class WatchdogConfig:
    """Seconds that a phase may take before the job counts as hung and ends; 0 for no limit.

    A phase includes waiting for the slowest rank. `start` is the time until the first phase, and
    `other` the time between phases.
    """

    start_s: Amount = 7200.0
    rollout_s: Amount = 14400.0
    old_logprobs_s: Amount = 7200.0
    train_s: Amount = 7200.0
    sync_s: Amount = 1800.0
    evaluation_s: Amount = 14400.0
    checkpoint_s: Amount = 3600.0
    other_s: Amount = 3600.0

    def limits(self) -> dict[str, float]:
        """Return the limits by the name of the phase."""
        return {name.removesuffix("_s"): value for name, value in dataclasses.asdict(self).items()}


@dataclass(frozen=True)
class SinkConfig:
    """Where metrics go besides `metrics.jsonl` and the console."""

    wandb: Literal["off", "offline", "online"] = "off"
    tensorboard: bool = False


@dataclass(frozen=True)
class RunConfig:
    """Everything that defines a run. Recipes that differ in precision differ in nothing else."""

    recipe: str
    precision: str = "fp16"
    seed: Count = 42
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
        """The dtype of every kind of tensor, by `precision` and the settings that change it."""
        return policy(self.precision, self.sync.wire_source, self.kernels.fp32_lm_head)

    @property
    def records_routing(self) -> bool:
        """True if rollouts carry the experts that the engine's routers chose."""
        return self.model.num_experts > 0 and self.rollout.record_routing

    @property
    def max_sequence_tokens(self) -> int:
        """The longest prompt plus the longest response."""
        return self.task.max_prompt_tokens + self.rollout.max_response_tokens

    @property
    def width_multiple(self) -> int:
        """The padded widths of the trainer's micro-batches are multiples of this.

        Sequence parallelism divides a width by the tensor-parallel size, and oneDNN compiles a
        kernel for every shape of a 16-bit product: few widths mean few kernels.
        """
        return math.lcm(1 if self.policy.params == "fp32" else 8, self.parallel.tp_size)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Return the config as plain JSON values, for `config.json` and for a dry run."""
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values


def fingerprint(parts: Any) -> str:
    """Return twelve hex digits that name a configuration; equal values give equal names."""
    text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:12]
