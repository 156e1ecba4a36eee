"""Records the experts that vLLM's routers choose for each token, by request.

vLLM's own output for this (`enable_return_routed_experts`) needs Triton kernels and is refused on
a CPU. The hook of its routers fires wherever layers run eagerly. A step's choices are cut into
requests where vLLM books the step's tokens: a batch has the scheduled tokens of one request after
another.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from megatron_precision.config.schema import UNKNOWN_EXPERT


class RoutedExperts:
    """Records the experts of watched requests, [tokens, layers, k] uint8.

    Args:
        runner: vLLM's model runner.
        num_layers, top_k: of the model.
    """

    def __init__(self, runner: Any, num_layers: int, top_k: int) -> None:
        from vllm.model_executor.layers.fused_moe.layer import MoERunner

        self._runner = runner
        self._shape = (num_layers, top_k)
        self._step: list[NDArray[np.uint8] | None] = [None] * num_layers
        self._kept: dict[str, list[tuple[int, NDArray[np.uint8]]]] = {}
        found = [m for m in runner.get_model().modules() if isinstance(m, MoERunner)]
        if sorted(m.layer_id for m in found) != list(range(num_layers)):
            raise RuntimeError(
                f"vLLM has routers in layers {sorted(m.layer_id for m in found)}, "
                f"not in each of {num_layers}"
            )
        for module in found:
            module.router.set_capture_fn(functools.partial(self._capture, module.layer_id))
        runner._bookkeeping_sync = self._cut(runner._bookkeeping_sync)

    def watch(self, request_id: str) -> None:
        """Start to record a request, by vLLM's own id."""
        self._kept[request_id] = []

    def pop(self, request_id: str, num_tokens: int) -> NDArray[np.uint8] | None:
        """Return and drop a finished request's experts; None if it was not watched.

        Args:
            num_tokens: of prompt and response.
        """
        pieces = self._kept.pop(request_id, None)
        if pieces is None:
            return None
        found = np.full((num_tokens, *self._shape), UNKNOWN_EXPERT, dtype=np.uint8)
        for begin, rows in pieces:  # a request that was put off is computed again
            found[begin : begin + len(rows)] = rows
        return found

    def clear(self) -> None:
        """Drop the records of requests that were dropped."""
        self._kept.clear()

    def _capture(self, layer: int, chosen: torch.Tensor) -> None:
        self._step[layer] = chosen.to(device="cpu", dtype=torch.uint8).numpy()

    def _cut(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def bookkeeping(scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
            if self._kept:
                self._book(scheduler_output)
            return original(scheduler_output, *args, **kwargs)

        return bookkeeping

    def _book(self, scheduler_output: Any) -> None:
        batch = self._runner.input_batch
        scheduled = scheduler_output.num_scheduled_tokens
        block = np.stack([rows for rows in self._step if rows is not None], axis=1)
        at = 0
        for row, name in enumerate(batch.req_ids):
            count = scheduled[name]
            pieces = self._kept.get(name)
            if pieces is not None:
                begin = int(batch.num_computed_tokens_cpu[row])
                pieces.append((begin, block[at : at + count]))
            at += count
        if at > len(block):
            raise RuntimeError(f"vLLM scheduled {at} tokens, and its routers saw {len(block)}")
