"""Computes log-probs and entropies on a GPU in one pass over the logits, forward and backward.

PyTorch's operators would read and write FP32 copies of the logits some twenty times, and keep four
of them: ten gigabytes for 4,096 tokens of a vocabulary of 152k. Here a program reads a row once,
keeps running sums in FP32 and writes only these; backward it reads the row again and writes the
gradient in the logits' dtype. The kernels are Triton's and need a GPU, or Triton's interpreter
(`TRITON_INTERPRET=1`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

_COLUMNS = 4096  # of one step of a program
_WARPS = 8


@triton.jit
def _sums_of_rows(  # type: ignore[no-untyped-def]
    logits, rows, peaks, sums, weighted, stride, real, inverse_temperature, COLUMNS: tl.constexpr
):
    number = tl.program_id(0)
    row = logits + tl.load(rows + number) * stride
    peak = float("-inf")
    total = 0.0
    product = 0.0
    for first in range(0, real, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        inside = columns < real
        x = tl.load(row + columns, mask=inside, other=float("-inf")).to(tl.float32)
        x *= inverse_temperature
        higher = tl.maximum(peak, tl.max(x, 0))
        shifted = x - higher
        exps = tl.exp(shifted)
        # The sums so far, as seen from the new peak; there are none before the first step.
        drop = tl.where(first == 0, 0.0, peak - higher)
        factor = tl.exp(drop)
        product = factor * (product + drop * total)
        product += tl.sum(tl.where(inside, exps * shifted, 0.0), 0)
        total = factor * total + tl.sum(exps, 0)
        peak = higher
    tl.store(peaks + number, peak)
    tl.store(sums + number, total)
    tl.store(weighted + number, product)


@triton.jit
def _gradient_of_rows(  # type: ignore[no-untyped-def]
    logits,
    rows,
    log_norms,
    targets,
    grads,
    out,
    stride,
    out_stride,
    real,
    width,
    inverse_temperature,
    COLUMNS: tl.constexpr,
):
    number = tl.program_id(0)
    row = tl.load(rows + number)
    grad = tl.load(grads + number)
    log_norm = tl.load(log_norms + number)
    target = tl.load(targets + number)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = logits + row * stride + columns
    x = tl.load(place, mask=columns < real, other=float("-inf")).to(tl.float32)
    share = tl.exp(x * inverse_temperature - log_norm)
    found = grad * (tl.where(columns == target, 1.0, 0.0) - share) * inverse_temperature
    found = tl.where(columns < real, found, 0.0)
    place = out + row * out_stride + columns
    tl.store(place, found.to(out.dtype.element_ty), mask=columns < width)


def row_sums(
    logits: torch.Tensor, rows: torch.Tensor, real: int, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute running sums of some rows' real columns, x = logits / temperature.

    Args:
        logits: [N, V], rows contiguous.
        rows: [R] int64.
        real: columns that count, from the first.

    Returns:
        (peak, Σ exp(x - peak), Σ exp(x - peak) · (x - peak)), each [R] FP32; -inf, 0 and 0 where
        no column counts.
    """
    assert logits.stride(1) == 1
    peaks = torch.full(rows.shape, float("-inf"), dtype=torch.float32, device=logits.device)
    sums, weighted = torch.zeros_like(peaks), torch.zeros_like(peaks)
    if len(rows) and real:
        _sums_of_rows[(len(rows),)](
            logits, rows, peaks, sums, weighted, logits.stride(0), real, 1.0 / temperature,
            COLUMNS=_COLUMNS, num_warps=_WARPS,
        )  # fmt: skip
    return peaks, sums, weighted


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
    """Compute the gradient of Σ g · (x_target - log_norm) with respect to the logits.

    Args:
        logits, rows, real, temperature: see `row_sums`.
        log_norms: [R] FP32.
        targets: [R] int64, columns; one that is not here is negative or not less than `real`.
        grads: [R] FP32.

    Returns:
        [N, V] in the logits' dtype; zero in other rows and in columns that do not count.
    """
    assert logits.stride(1) == 1
    out = torch.zeros_like(logits, memory_format=torch.contiguous_format)
    if len(rows):
        width = logits.shape[1]
        _gradient_of_rows[(len(rows), triton.cdiv(width, _COLUMNS))](
            logits, rows, log_norms, targets, grads, out, logits.stride(0), out.stride(0), real,
            width, 1.0 / temperature, COLUMNS=_COLUMNS, num_warps=_WARPS,
        )  # fmt: skip
    return out
