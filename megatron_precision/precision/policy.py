"""Defines the precision policy: the one place where the project decides a dtype.

A policy names the dtype of every kind of tensor in a run. Training and rollout can differ on
purpose (the paper's ablation), never by accident: everything else asks the policy, and
`precision/audit.py` reads back what the tensors really are. This module imports no torch, so that
`--help` and dry runs stay fast; `precision/dtypes.py` has the torch dtypes.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

DType = Literal["fp16", "bf16", "fp32"]
DTYPES: tuple[DType, ...] = ("fp16", "bf16", "fp32")
BYTES_PER_ELEMENT = {"fp16": 2, "bf16": 2, "fp32": 4}
WireSource = Literal["parameters", "main_copies"]


@dataclass(frozen=True)
class PrecisionPolicy:
    """The dtype of each kind of tensor in a run.

    Attributes:
        name: how a user asked for it, for example `fp16` or `bf16/fp16`.
        params: Megatron's model parameters, and the compute dtype of the trainer.
        grads: gradients of activations and weights as the backward pass produces them.
        grad_accumulate: Megatron's `main_grad` buffers, and their reduction over data parallelism.
        main_params: the optimizer's copies of the parameters, and its moments.
        router: the MoE router's GEMM and its softmax.
        lm_head: the trainer's output projection; logits leave it in this dtype and are reduced in
            fp32.
        logprobs: log-probs, losses, advantages and mismatch statistics.
        rollout_params: the engine's parameters, and its compute dtype.
        rollout_lm_head: the engine's output projection.
        kv_cache: the engine's KV cache.
        wire: what the weight sync carries between trainer and engine.
        wire_source: what the trainer casts to it: its parameters, or the optimizer's FP32 copies.
    """

    name: str
    params: DType
    grads: DType
    grad_accumulate: DType
    main_params: DType
    router: DType
    lm_head: DType
    logprobs: DType
    rollout_params: DType
    rollout_lm_head: DType
    kv_cache: DType
    wire: DType
    wire_source: WireSource = "parameters"

    @property
    def loss_scaling(self) -> bool:
        """True if the trainer needs a loss scale: only FP16 gradients can leave their range."""
        return self.grads == "fp16"


@functools.lru_cache(maxsize=64)
def policy(
    name: str, wire_source: WireSource = "parameters", fp32_lm_head: bool = False
) -> PrecisionPolicy:
    """Build the policy that a user names.

    Args:
        name: `fp16`, `bf16` or `fp32` for both sides, or `TRAIN/ROLLOUT` (`bf16/fp16`) to set
            the trainer's and the engine's dtype apart, as the paper's precision ablation does.
        wire_source: `main_copies` casts them to the engine's dtype, so that the engine's weights
            are rounded once and not twice.
        fp32_lm_head: both sides' output projections are fp32, whatever the rest is.

    Returns:
        The policy. Accumulation, reduction, main parameters, router and log-probs are fp32 in
        every policy, so that two policies differ in the dtype under study and in nothing else.

    Raises:
        ValueError: for any other name.
    """
    train, slash, rollout = name.partition("/")
    if not slash:
        rollout = train
    for part in (train, rollout):
        if part not in DTYPES:
            raise ValueError(
                f"unknown precision {name!r}: expected one of {', '.join(DTYPES)}, "
                "or TRAIN/ROLLOUT such as bf16/fp16"
            )
    return PrecisionPolicy(
        name=name,
        params=_dtype(train),
        grads=_dtype(train),
        grad_accumulate="fp32",
        main_params="fp32",
        router="fp32",
        lm_head="fp32" if fp32_lm_head else _dtype(train),
        logprobs="fp32",
        rollout_params=_dtype(rollout),
        rollout_lm_head="fp32" if fp32_lm_head else _dtype(rollout),
        kv_cache=_dtype(rollout),
        wire=_dtype(rollout if wire_source == "main_copies" else train),
        wire_source=wire_source,
    )


def _dtype(name: str) -> DType:
    return next(dtype for dtype in DTYPES if dtype == name)


def is_precision(name: str) -> bool:
    """Say whether a precision policy has this name."""
    try:
        policy(name)
    except ValueError:
        return False
    return True
