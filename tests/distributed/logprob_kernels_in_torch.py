"""What `actor/logprob_kernels.py` promises, by PyTorch's operators: for ranks without a GPU."""

from __future__ import annotations

import torch


def row_sums(
    logits: torch.Tensor, rows: torch.Tensor, real: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scaled = logits[rows, :real].float() / temperature
    if not real:
        empty = torch.zeros(rows.shape)
        return empty - float("inf"), empty, empty.clone()
    peaks = scaled.amax(-1)
    shifted = scaled - peaks[:, None]
    return peaks, shifted.exp().sum(-1), (shifted.exp() * shifted).sum(-1)


def row_gradients(
    logits: torch.Tensor,
    rows: torch.Tensor,
    real: int,
    temperature: float,
    *,
    log_norms: torch.Tensor,
    targets: torch.Tensor,
    grads: torch.Tensor,
) -> torch.Tensor:
    shares = (logits[rows, :real].float() / temperature - log_norms[:, None]).exp()
    here = torch.arange(real) == targets[:, None]
    found = torch.zeros_like(logits)
    found[rows, :real] = (grads[:, None] * (here.float() - shares) / temperature).to(logits.dtype)
    return found
