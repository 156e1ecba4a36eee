"""Reads back the dtype of every tensor of a run, and refuses to start if one disagrees."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from megatron_precision.precision.dtypes import dtype_name
from megatron_precision.precision.policy import PrecisionPolicy


class PrecisionAuditError(RuntimeError):
    """A tensor has another dtype than the policy says."""


@dataclass(frozen=True)
class Reading:
    """A tensor's dtype, as it was found.

    Attributes:
        kind: the policy's field that decides it.
        where: the tensor's name.
        dtype: as found.
    """

    kind: str
    where: str
    dtype: torch.dtype


def check(readings: list[Reading], policy: PrecisionPolicy) -> dict[str, str]:
    """Compare readings with the policy.

    Returns:
        For every kind, the dtype that all its readings have.

    Raises:
        PrecisionAuditError: listing every offender.
    """
    offenders = [
        f"{r.where}: {dtype_name(r.dtype)}, but the policy {policy.name} says "
        f"{getattr(policy, r.kind)} for {r.kind}"
        for r in readings
        if dtype_name(r.dtype) != getattr(policy, r.kind)
    ]
    if offenders:
        raise PrecisionAuditError(
            f"{len(offenders)} tensors disagree with the precision policy:\n  "
            + "\n  ".join(offenders)
        )
    return {r.kind: dtype_name(r.dtype) for r in readings}


def read_trainer(model: torch.nn.Module, optimizer: Any) -> Iterator[Reading]:
    """Read the dtypes of parameters, gradient buffers and the optimizer's copies.

    Args:
        model: Megatron's DistributedDataParallel model.
        optimizer: Megatron's (chained) optimizer.
    """
    for name, parameter in model.named_parameters():
        yield Reading("params", f"trainer parameter {name}", parameter.dtype)
        yield Reading("grad_accumulate", f"main_grad of {name}", parameter.main_grad.dtype)
    for member in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in member.optimizer.param_groups:
            for number, parameter in enumerate(group["params"]):
                yield Reading("main_params", f"main parameter {number}", parameter.dtype)
        for number, state in enumerate(member.optimizer.state.values()):
            for key in ("exp_avg", "exp_avg_sq"):
                if key in state:
                    yield Reading("main_params", f"{key} of parameter {number}", state[key].dtype)


class ForwardReadings:
    """Records dtypes that exist only during a pass: gradients, router, logits.

    Use as a context manager around one forward and backward pass of the trainer.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.readings: list[Reading] = []
        self._model = model
        self._undo: list[Any] = []

    def __enter__(self) -> ForwardReadings:
        for name, module in self._model.named_modules():
            if name.endswith("output_layer"):
                self._undo.append(module.register_forward_hook(self._hook("lm_head", name)).remove)
            if name.endswith("mlp.router"):
                self._watch_gating(name, module)
            if name.endswith(("self_attention", "mlp")):
                hook = module.register_forward_hook(self._gradient_hook(name))
                self._undo.append(hook.remove)
        return self

    def __exit__(self, *_exc: object) -> None:
        for undo in self._undo:
            undo()

    def _hook(self, kind: str, name: str) -> Any:
        def record(_module: Any, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            self.readings.append(Reading(kind, f"trainer output of {name}", first.dtype))

        return record

    def _gradient_hook(self, name: str) -> Any:
        def watch(_module: Any, _inputs: Any, output: Any) -> None:
            first = output[0] if isinstance(output, tuple) else output
            if first.requires_grad:
                first.register_hook(
                    lambda grad: self.readings.append(
                        Reading("grads", f"gradient of {name}'s output", grad.dtype)
                    )
                )

        return watch

    def _watch_gating(self, name: str, router: Any) -> None:
        original = router.gating

        def gating(*args: Any, **kwargs: Any) -> torch.Tensor:
            logits = original(*args, **kwargs)
            self.readings.append(Reading("router", f"router logits of {name}", logits.dtype))
            return logits

        router.gating = gating
        self._undo.append(lambda: delattr(router, "gating"))


def read_engine(engine: Any) -> Iterator[Reading]:
    """Read the dtypes of the engine's parameters, output projection and KV cache."""
    for name, parameter in engine.model.named_parameters():
        yield Reading("rollout_params", f"engine parameter {name}", parameter.dtype)
    yield Reading("rollout_lm_head", "the engine's output projection", engine.head_dtype)
    for number, cache in enumerate(engine.kv_caches):
        yield Reading("kv_cache", f"KV cache of layer {number}", cache.dtype)
