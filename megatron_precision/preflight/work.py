"""Computes an iteration's tokens and operations from the configuration and mean lengths.

With N the weights that a token is multiplied with, L layers, H heads of d, and T the tokens of a
sequence, a forward pass takes of each token

    2 N + 4 L H d T / 2

operations: one multiplication and one addition a weight, and the products with the keys and with
the values of the tokens before it, T / 2 on average. A backward pass takes twice as many, so that
training takes 6 N + 6 L H d T. Full recomputation adds one forward pass of the layers.

Source: Narayanan et al., arXiv 2104.04473, appendix, with half of the attention as Megatron-LM
counts it since (`num_floating_point_operations`); Chowdhery et al., arXiv 2204.02311, appendix B,
count 6 N + 12 L H d T, twice the attention. Attention that writes its scores
(`memory.attention=scores`) computes what the mask hides: its T is not halved here.

This module imports no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_precision.config.schema import ModelConfig, RunConfig
from megatron_precision.layouts.architectures import architecture
from megatron_precision.rl.algorithms import algorithm


@dataclass(frozen=True)
class Lengths:
    """Mean number of tokens of a prompt and of a response."""

    prompt: float
    response: float

    @property
    def sequence(self) -> float:
        """The tokens of prompt and response together."""
        return self.prompt + self.response


@dataclass(frozen=True)
class Work:
    """The work of one iteration of the whole job.

    Attributes:
        sampled_sequences: sequences that the engines sample.
        trained_sequences: sequences of the batch, a part of the sampled ones.
        sampled_tokens: tokens of sampled responses.
        trained_tokens: tokens of prompts and responses in the batch, without padding.
        prefill_flops, decode_flops: operations of the engines.
        old_logprobs_flops: operations of the forward-only pass, averaged over iterations.
        training_flops: operations of the forward and backward passes.
        recomputed_flops: operations of layers that run again.
    """

    sampled_sequences: int
    trained_sequences: int
    sampled_tokens: float
    trained_tokens: float
    prefill_flops: float
    decode_flops: float
    old_logprobs_flops: float
    training_flops: float
    recomputed_flops: float

    @property
    def flops(self) -> float:
        """All operations of the iteration."""
        trainer = self.old_logprobs_flops + self.training_flops + self.recomputed_flops
        return self.prefill_flops + self.decode_flops + trainer


def layer_weights(model: ModelConfig) -> int:
    """Count the weights in the layers' matrices that one token is multiplied with."""
    hidden = model.hidden_size
    heads = model.num_attention_heads + model.num_key_value_heads
    layer = 2 * hidden * heads * model.head_dim
    if architecture(model).experts:
        layer += hidden * model.num_experts
        layer += model.num_experts_per_tok * 3 * hidden * model.moe_intermediate_size
    else:
        layer += 3 * hidden * model.intermediate_size
    return model.num_hidden_layers * layer


def active_weights(model: ModelConfig) -> int:
    """Count N, the weights of the layers and the LM head that one token is multiplied with.

    An embedding is looked up, and norms are not matrix products.
    """
    return layer_weights(model) + model.vocab_size * model.hidden_size


def attention_flops(model: ModelConfig, keys: float) -> float:
    """Count the forward operations of one token's attention to `keys` keys, in all layers."""
    return 4 * model.num_hidden_layers * model.num_attention_heads * model.head_dim * keys


def training_flops(model: ModelConfig, tokens: float, *, masked: bool = True) -> float:
    """Count the forward and backward operations of one token, without recomputation.

    Args:
        tokens: length of the token's sequence.
        masked: whether the kernel skips what the causal mask hides.
    """
    return 6 * active_weights(model) + 3 * attention_flops(model, tokens / (1 + masked))


def of_iteration(config: RunConfig, lengths: Lengths, sampled_per_kept: float) -> Work:
    """Compute the work of an iteration in which every sequence has the mean length.

    Args:
        sampled_per_kept: groups sampled for each group of the batch; 1 without dynamic sampling.
    """
    model, train = config.model, config.train
    kept = train.prompts_per_iteration * train.rollouts_per_prompt
    sampled = round(train.prompts_per_iteration * sampled_per_kept) * train.rollouts_per_prompt
    prompts = sampled / (train.rollouts_per_prompt if config.rollout.prefix_caching else 1)
    keys = lengths.prompt + lengths.response / 2
    tokens = kept * lengths.sequence
    masked = config.memory.attention == "fused" or config.policy.params == "fp32"
    training = training_flops(model, lengths.sequence, masked=masked)
    attention = attention_flops(model, lengths.sequence / (1 + masked))
    layers = 2 * layer_weights(model) + attention
    return Work(
        sampled_sequences=sampled,
        trained_sequences=kept,
        sampled_tokens=sampled * lengths.response,
        trained_tokens=tokens,
        prefill_flops=prompts
        * lengths.prompt
        * (2 * layer_weights(model) + attention_flops(model, lengths.prompt / 2)),
        decode_flops=sampled
        * lengths.response
        * (2 * active_weights(model) + attention_flops(model, keys)),
        old_logprobs_flops=tokens * training / 3 * _share_scored_before(config),
        training_flops=tokens * training,
        recomputed_flops=tokens * layers if config.memory.recompute == "full" else 0.0,
    )


def _share_scored_before(config: RunConfig) -> float:
    """Return the share of sequences in the forward-only pass: all mini-batches but the first."""
    steps, every = config.train.steps_per_iteration, config.train.mismatch_every
    often = 1.0 if algorithm(config.algo.name).needs_old_logprobs else 1 / every if every else 0.0
    return often * (steps - 1) / steps
