"""Watches the residual stream of two forward passes and says how far one is from the other.

At every point p (embedding, each layer, final norm, LM head) and token t, x of the pass under
study and r of the FP32 reference on the same weights and tokens,

    e_t(p) = ||x_t - r_t|| / ||r_t||        over the hidden size, or over the vocabulary

Two passes are compared: `free` runs as in training, so that errors of earlier layers arrive at
later ones; `forced` gives every layer the reference's own input, rounded to its dtype, so that
e_t is what this layer alone adds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_precision.actor.batch import Batch, MicroBatch, TokenLayout
from megatron_precision.replay.findings import (
    EMBEDDING,
    FINAL_NORM,
    LM_HEAD,
    PointError,
    layer_name,
)

Mode = Literal["free", "forced"]


@dataclass
class _Sums:
    """Sums over tokens of one point: of e_t, its maximum, and of tokens with another top-k set."""

    error: float = 0.0
    largest: float = 0.0
    tokens: int = 0
    router_error: float = 0.0
    flipped: int = 0
    routed: int = 0

    def add(self, other: _Sums) -> None:
        self.error += other.error
        self.largest = _larger(self.largest, other.largest)
        self.tokens += other.tokens
        self.router_error += other.router_error
        self.flipped += other.flipped
        self.routed += other.routed


def _larger(a: float, b: float) -> float:
    return float("nan") if a != a or b != b else max(a, b)


@dataclass
class _Router:
    """[s, c, experts] FP32 logits and [s, c, experts] bool, the chosen."""

    logits: torch.Tensor
    chosen: torch.Tensor


class Recorder:
    """Records the reference's activations at each point in the last micro-batch."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        self.routers: dict[str, _Router] = {}
        for name, module in _points(model):
            module.register_forward_pre_hook(self._keep_input(name), with_kwargs=True)
            module.register_forward_hook(self._keep_output(name))
        for name, router in _routers(model):
            router.register_forward_hook(self._keep_router(name))

    def _keep_input(self, name: str) -> Any:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if name != EMBEDDING:
                self.inputs[name] = args[0] if args else kwargs["hidden_states"]

        return hook

    def _keep_output(self, name: str) -> Any:
        def hook(_module: torch.nn.Module, _args: Any, output: Any) -> None:
            self.outputs[name] = output[0] if isinstance(output, tuple) else output

        return hook

    def _keep_router(self, name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            self.routers[name] = _routing(module, args[0], output)

        return hook


class Comparer:
    """Measures the distance of a model's activations from the recorded ones."""

    def __init__(self, model: torch.nn.Module, reference: Recorder) -> None:
        self._reference = reference
        self._mode: Mode | None = None
        self._sums: dict[Mode, dict[str, _Sums]] = {"free": {}, "forced": {}}
        self._real = torch.empty(0, dtype=torch.bool)
        self._predicts = torch.empty(0, dtype=torch.bool)
        for name, module in _points(model):
            module.register_forward_pre_hook(self._force(name), with_kwargs=True)
            module.register_forward_hook(self._compare(name))
        for name, router in _routers(model):
            router.register_forward_hook(self._compare_router(name))

    @contextmanager
    def comparing(self, mode: Mode, batch: Batch, micro: MicroBatch) -> Iterator[None]:
        """Compare the passes of a block, which run this micro-batch."""
        part = batch.select(micro.rows, micro.width)
        layout = TokenLayout.of(micro, part.lengths)
        positions = torch.arange(micro.width)
        self._real = layout.to_layers(positions < part.lengths[:, None], False)
        self._predicts = layout.to_layers(part.predicts(), False)
        self._mode = mode
        try:
            yield
        finally:
            self._mode = None

    def errors(self, mode: Mode, layers: int) -> list[PointError]:
        """Return the measurements of all ranks, in the order of the model."""
        everyone: list[dict[str, _Sums]] = [{} for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, self._sums[mode])
        merged: dict[str, _Sums] = {}
        for sums in everyone:
            for name, found in sums.items():
                merged.setdefault(name, _Sums()).add(found)
        order = [EMBEDDING, *(layer_name(n) for n in range(layers)), FINAL_NORM, LM_HEAD]
        return [
            PointError(
                name=name,
                mean=total.error / total.tokens if total.tokens else 0.0,
                largest=total.largest,
                router_mean=total.router_error / total.routed if total.routed else None,
                flipped_share=total.flipped / total.routed if total.routed else None,
            )
            for name in order
            if (total := merged.get(name)) is not None
        ]

    def _force(self, name: str) -> Any:
        def hook(_module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._mode != "forced" or name == EMBEDDING:
                return None
            exact = self._reference.inputs[name]
            if args:
                return (exact.to(args[0].dtype), *args[1:]), kwargs
            return args, {**kwargs, "hidden_states": exact.to(kwargs["hidden_states"].dtype)}

        return hook

    def _compare(self, name: str) -> Any:
        def hook(_module: torch.nn.Module, _args: Any, output: Any) -> None:
            if self._mode is None:
                return
            ours = output[0] if isinstance(output, tuple) else output
            head = name == LM_HEAD
            error, size = _norms(ours, self._reference.outputs[name], across_tp=head)
            rows = self._predicts if head else self._real
            rows = _local(rows, ours.shape[0], ours.device)
            self._at(name).add(_summed((error / size)[rows]))

        return hook

    def _compare_router(self, name: str) -> Any:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> None:
            if self._mode is None:
                return
            ours, exact = _routing(module, args[0], output), self._reference.routers[name]
            rows = _local(self._real, ours.logits.shape[0], ours.logits.device)
            error, size = _norms(ours.logits, exact.logits, across_tp=False)
            flipped = (ours.chosen != exact.chosen).any(-1)[rows]
            self._at(name).add(
                _Sums(
                    router_error=float((error / size)[rows].sum()),
                    flipped=int(flipped.sum()),
                    routed=flipped.numel(),
                )
            )

        return hook

    def _at(self, name: str) -> _Sums:
        assert self._mode is not None
        return self._sums[self._mode].setdefault(name, _Sums())


def _points(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield this stage's points; a middle stage has neither embedding nor head."""
    for path, module in model.named_modules():
        parent, _, leaf = path.rpartition(".")
        if path == "embedding":
            yield EMBEDDING, module
        elif leaf.isdigit() and parent == "decoder.layers":
            yield _layer(module), module
        elif path == "decoder.final_layernorm":
            yield FINAL_NORM, module
        elif path == "output_layer":
            yield LM_HEAD, module


def _layer(module: Any) -> str:
    # Megatron counts over all stages, from 1.
    return layer_name(module.layer_number - 1)


def _routers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    for name, module in _points(model):
        router = getattr(getattr(module, "mlp", None), "router", None)
        if router is not None:
            yield name, router


def _routing(router: Any, hidden: torch.Tensor, output: tuple[torch.Tensor, ...]) -> _Router:
    logits = router.gating(hidden).float()
    return _Router(logits, output[1].view(logits.shape).bool())


def _norms(
    ours: torch.Tensor, exact: torch.Tensor, *, across_tp: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (||x - r||, ||r||) of each token, [s, c] FP64 each; 0 / 0 counts as no error."""
    exact = exact.double()
    sums = torch.stack([(ours.double() - exact).square().sum(-1), exact.square().sum(-1)])
    if across_tp:
        dist.all_reduce(sums, group=parallel_state.get_tensor_model_parallel_group())
    error, size = sums.sqrt()
    return error, torch.where((size == 0) & (error == 0), torch.ones_like(size), size)


def _local(rows: torch.Tensor, length: int, device: torch.device) -> torch.Tensor:
    """Select this rank's part of [s, c] bool, if the sequence is divided."""
    rows = rows.to(device)
    if rows.shape[0] == length:
        return rows
    size = parallel_state.get_tensor_model_parallel_world_size()
    return rows.chunk(size)[parallel_state.get_tensor_model_parallel_rank()]


def _summed(errors: torch.Tensor) -> _Sums:
    if not errors.numel():
        return _Sums()
    return _Sums(float(errors.sum()), float(errors.max()), errors.numel())
