"""The same tokens through transformers and through Megatron Core, each with its own loader."""

from __future__ import annotations

import json
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_precision.config.errors import UserError
from megatron_precision.config.schema import MemoryConfig, ModelConfig, ParallelConfig
from megatron_precision.launch import rank
from megatron_precision.precision.policy import policy
from tools.checkpoint_convert.blocks import Source
from tools.checkpoint_convert.folders import is_megatron, one_format_problem
from tools.checkpoint_convert.source import open_source

TEXT = (
    "The bridge was closed for repairs in the spring of 1987, and for eleven months everyone in "
    "the valley took the long road around the lake. When it opened again, the first to cross was "
    "a baker with forty loaves of bread: 17 + 25 = 42, he said, counting what he had sold."
)
# FP32 on both sides, other kernels: what rounding makes of some 30 layers.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class LogitsComparison:
    """Log-probabilities of every vocabulary entry at every position.

    Attributes:
        tokens: positions that were compared.
        from_text: whether they are real text, by the checkpoint's own tokenizer.
        largest, mean: absolute difference of log-probabilities (nats).
        same_choice: share of positions whose most likely token is the same.
    """

    tokens: int
    from_text: bool
    largest: float
    mean: float
    same_choice: float


def compare_logits(first: Path, second: Path, config: Path | None = None) -> LogitsComparison:
    """Forward both checkpoints in FP32, in this process.

    Args:
        first, second: one of each format, in either order.

    Raises:
        UserError: where they are of one format.
    """
    if problems := one_format_problem(first, second):
        raise UserError(problems)
    hf, megatron = sorted((first, second), key=is_megatron)
    tokens, from_text = _tokens(open_source(hf))
    # transformers first, with nothing of torch replaced: it is the independent side.
    theirs = _hf_logprobs(hf, tokens)
    ours = _megatron_logprobs(megatron, open_source(megatron, config).model, tokens)
    gap = (ours - theirs).abs()
    same = (ours.argmax(-1) == theirs.argmax(-1)).float().mean()
    return LogitsComparison(
        tokens.numel(), from_text, float(gap.max()), float(gap.mean()), float(same)
    )


def _tokens(source: Source) -> tuple[torch.Tensor, bool]:
    """[1, length] int64; without a tokenizer, random ones."""
    import transformers

    vocabulary = source.model.vocab_size
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source.sidecar)
        ids = tokenizer(TEXT).input_ids
        if not ids:
            raise ValueError("a tokenizer without a vocabulary")
    except (OSError, ValueError, KeyError, TypeError, json.JSONDecodeError):
        print("no tokenizer that can be read: random tokens are used")
        generator = torch.Generator().manual_seed(0)
        return torch.randint(0, vocabulary, (1, 64), generator=generator), False
    longest = source.model.max_position_embeddings
    return torch.tensor([ids[:longest]]), True


@torch.no_grad()
def _hf_logprobs(folder: Path, tokens: torch.Tensor) -> torch.Tensor:
    import transformers

    transformers.utils.logging.disable_progress_bar()  # it draws into files too
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    return model(tokens).logits[0].float().log_softmax(-1)


@torch.no_grad()
def _megatron_logprobs(folder: Path, model: ModelConfig, tokens: torch.Tensor) -> torch.Tensor:
    rank.become_world_of_one()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    from megatron_precision.platform import startup

    startup.start(seed=0)
    from megatron.core import dist_checkpointing

    from megatron_precision.actor import models, parallel

    layout = ParallelConfig(1, tp_size=1, rollout_tp_size=1)
    if not torch.distributed.is_initialized():
        parallel.open_world(startup.backend())
    parallel.divide_world(layout, seed=0)
    config = models.transformer_config(model, layout, policy("fp32"), MemoryConfig())
    module = models.build_model(model, layout, config, MemoryConfig()).eval()
    with warnings.catch_warnings():
        # Megatron Core calls what PyTorch deprecates; neither is for who reads the comparison.
        for message in ("`load_state_dict` is deprecated", "Please use DTensor instead"):
            warnings.filterwarnings("ignore", message, FutureWarning)
        held = dist_checkpointing.load(module.sharded_state_dict(), str(folder))
    module.load_state_dict(held)
    positions = torch.arange(tokens.shape[1])[None]
    logits = module(tokens, positions, attention_mask=None)[0]
    torch.distributed.destroy_process_group()
    return logits[:, : model.vocab_size].float().log_softmax(-1)
