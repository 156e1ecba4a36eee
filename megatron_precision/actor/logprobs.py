"""Computes log-probs and entropies of given tokens from vocabulary-sharded logits, in FP32.

    log p(t) = x_t - log sum_v exp(x_v),   x = logits / temperature,   v over the real vocabulary

Each tensor-parallel rank has the columns of its part of the padded vocabulary; padded columns do
not count. A call takes two small collectives: one maximum and one sum. PyTorch sums over columns
on the CPU, and `logprob_kernels.py` on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist


def _share(
    columns: int, targets: torch.Tensor, vocab_size: int, group: dist.ProcessGroup
) -> tuple[int, torch.Tensor, torch.Tensor]:
    """This rank's part of the vocabulary: how many of its columns are real, the targets' columns,
    and which of these targets are here; the column of one that is not says nothing."""
    first = dist.get_rank(group) * columns
    real = max(0, min(columns, vocab_size - first))
    local = targets - first
    return real, local.clamp(0, columns - 1), (local >= 0) & (local < real)


class _VocabParallelLogprob(torch.autograd.Function):
    """FP32 statistics of the sharded softmax; backward is g (onehot - softmax) / temperature."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        targets: torch.Tensor,
        vocab_size: int,
        temperature: float,
        group: dist.ProcessGroup,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        columns = logits.shape[-1]
        real, local, mine = _share(columns, targets, vocab_size, group)
        scaled = logits.float() / temperature
        scaled[:, real:] = float("-inf")

        peak = scaled.amax(-1) if columns else scaled.new_full(scaled.shape[:1], float("-inf"))
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        shifted = scaled - peak[:, None]
        exps = shifted.exp()
        target = shifted.gather(-1, local[:, None]).squeeze(-1).masked_fill(~mine, 0.0)
        # Padded columns are exp(-inf) * -inf: left out, not multiplied.
        weighted = (exps[:, :real] * shifted[:, :real]).sum(-1)
        sums = torch.stack([exps.sum(-1), weighted, target])
        dist.all_reduce(sums, group=group)

        log_norm = sums[0].log()
        ctx.save_for_backward(exps / sums[0][:, None], local, mine)
        ctx.temperature = temperature
        ctx.logits_dtype = logits.dtype
        entropy = log_norm - sums[1] / sums[0]
        ctx.mark_non_differentiable(entropy)
        return sums[2] - log_norm, entropy

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor, _entropy: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None, None]:
        softmax, local, mine = ctx.saved_tensors
        logits_grad = softmax * -grad[:, None]
        logits_grad.scatter_add_(-1, local[:, None], (grad * mine)[:, None])
        return (logits_grad / ctx.temperature).to(ctx.logits_dtype), None, None, None, None


class _FusedLogprob(torch.autograd.Function):
    """FP32 statistics of the sharded softmax by kernels that keep no FP32 copy of the logits."""

    @staticmethod
    def forward(
        ctx: Any,
        logits: torch.Tensor,
        rows: torch.Tensor,
        targets: torch.Tensor,
        vocab_size: int,
        temperature: float,
        group: dist.ProcessGroup,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        from megatron_precision.actor.logprob_kernels import row_sums

        real, local, mine = _share(logits.shape[-1], targets, vocab_size, group)
        local_peak, local_sum, local_weighted = row_sums(logits, rows, real, temperature)
        peak = local_peak.clone()
        dist.all_reduce(peak, op=dist.ReduceOp.MAX, group=group)
        # A rank of nothing but padding has sums of zero below any peak.
        drop = (local_peak - peak).masked_fill(local_sum == 0, 0.0)
        factor = drop.exp()
        scaled = logits[rows, local].float() / temperature
        target = (scaled - peak).masked_fill(~mine, 0.0)
        weighted = factor * (local_weighted + drop * local_sum)
        sums = torch.stack([factor * local_sum, weighted, target])
        dist.all_reduce(sums, group=group)

        log_norm = sums[0].log()
        ctx.save_for_backward(logits, rows, local.masked_fill(~mine, -1), peak + log_norm)
        ctx.temperature, ctx.real = temperature, real
        entropy = log_norm - sums[1] / sums[0]
        ctx.mark_non_differentiable(entropy)
        return sums[2] - log_norm, entropy

    @staticmethod
    def backward(
        ctx: Any, grad: torch.Tensor, _entropy: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None, None, None]:
        from megatron_precision.actor.logprob_kernels import row_gradients

        logits, rows, targets, log_norms = ctx.saved_tensors
        found = row_gradients(
            logits, rows, ctx.real, ctx.temperature,
            log_norms=log_norms, targets=targets, grads=grad.contiguous(),
        )  # fmt: skip
        return found, None, None, None, None, None


def by_kernels(logits: torch.Tensor) -> bool:
    """Say whether the GPU's kernels can read these logits."""
    return logits.is_cuda


def response_logprobs(
    logits: torch.Tensor,
    tokens: torch.Tensor,
    response_mask: torch.Tensor,
    *,
    temperature: float,
    vocab_size: int,
    tp_group: dist.ProcessGroup,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute log-probs and entropies at the response tokens of a micro-batch.

    Args:
        logits: [batch, length, padded_vocab / TP], the policy's LM head dtype; position t
            predicts token t + 1.
        tokens: [batch, length] int64.
        response_mask: [batch, length] bool; true where a token belongs to the response. The first
            token of a sequence never does: nothing predicts it.
        temperature: of the sampling distribution, > 0.
        vocab_size: without padding.
        tp_group: the ranks that share the vocabulary.

    Returns:
        (logprobs, entropies), each [batch, length] FP32, zero outside the response; the first is
        differentiable with respect to logits.
    """
    predicted = response_mask[:, 1:]
    targets = tokens[:, 1:][predicted]
    if by_kernels(logits):
        batch, length = tokens.shape
        grid = torch.arange(batch * length, device=logits.device).view(batch, length)
        logprobs, entropies = _FusedLogprob.apply(
            logits.flatten(0, 1),
            grid[:, :-1][predicted],
            targets,
            vocab_size,
            temperature,
            tp_group,
        )
    else:
        logprobs, entropies = _VocabParallelLogprob.apply(
            logits[:, :-1][predicted], targets, vocab_size, temperature, tp_group
        )
    empty = torch.zeros(tokens.shape, dtype=torch.float32, device=logits.device)
    return (
        empty.masked_scatter(response_mask, logprobs),
        empty.masked_scatter(response_mask, entropies),
    )
