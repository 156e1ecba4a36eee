"""Read the engine's weights back where its kernels read them, and compare them exactly.

A live parameter is not always what a kernel reads: on the CPU a linear layer keeps a packed copy
and its `weight` is empty. So a linear layer is asked for its weights through its own kernel: the
product with the identity returns every weight exactly, in every dtype (one term of each sum is
1 × w, the others are zero). Experts are packed for their kernel by a pure function, so the
expected stack is packed by the same function and compared with what the kernel holds. Embeddings
and norms are read as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

from megatron_precision.config import ModelConfig
from megatron_precision.rollout.vllm_engine import VllmEngine
from megatron_precision.weights.megatron_layout import ShardCoordinates
from megatron_precision.weights.vllm_layout import vllm_pieces


def verify_engine(
    engine: VllmEngine, tensors: Mapping[str, torch.Tensor], model: ModelConfig
) -> tuple[int, list[str]]:
    """Compare every weight of this rank's engine with the Hugging Face tensors it should hold.

    Returns:
        (number of parameters compared, a line for each that differs).
    """
    at = engine.coordinates()
    compared, differing = 0, []
    with torch.inference_mode():
        for name, live, pack in kernel_weights(engine.model):
            shape = _loader_shape(name, tuple(live.shape), model, at)
            expected = expected_parameter(name, shape, tensors, model, at).to(live.dtype)
            wrong = (pack(expected) != live) if pack else (expected != live)
            compared += 1
            if wrong.any():
                differing.append(f"{name}: {int(wrong.sum())} of {wrong.numel()} elements differ")
    return compared, differing


def kernel_weights(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor, Any]]:
    """Yield (parameter, what the kernel reads, packing function or None) for a vLLM model.

    Padded rows of the vocabulary are left out of what is yielded.
    """
    seen: set[int] = set()
    for prefix, layer in model.named_modules():
        kernel = getattr(getattr(layer, "quant_method", None), "moe_kernel", None)
        if kernel is not None:
            experts = kernel.fused_experts
            for which in ("w13_weight", "w2_weight"):
                seen.add(id(getattr(layer, which)))
                yield f"{prefix}.{which}", getattr(layer, which), _expert_packing(experts)
        elif hasattr(layer, "quant_method") and isinstance(
            getattr(layer, "weight", None), torch.nn.Parameter
        ):
            seen.add(id(layer.weight))
            yield f"{prefix}.weight", _through_kernel(layer), None
    for name, parameter in model.named_parameters():
        if id(parameter) not in seen and parameter.numel():
            yield name, parameter, None


def expected_parameter(
    name: str,
    shape: tuple[int, ...],
    tensors: Mapping[str, torch.Tensor],
    model: ModelConfig,
    at: ShardCoordinates,
) -> torch.Tensor:
    """A vLLM parameter of this rank in loader layout, put together from Hugging Face tensors."""
    # Padding rows are zero on both sides; a rank may hold nothing else.
    expected = torch.zeros(shape, dtype=next(iter(tensors.values())).dtype)
    for piece in vllm_pieces(name, shape, model, at):
        view = expected.view(piece.view)[piece.spans]
        view.copy_(tensors[piece.hf_name][piece.box].reshape(view.shape))
    return expected


def _through_kernel(layer: Any) -> torch.Tensor:
    """The layer's weights [out, in] as its kernel reads them."""
    if hasattr(layer, "num_embeddings_per_partition"):
        if not hasattr(layer, "cpu_linear"):  # an embedding is looked up, not multiplied
            return layer.weight  # type: ignore[no-any-return]
        inner = layer.embedding_dim
    else:
        # Row-parallel layers hold a part of their inputs; others all of them.
        inner = getattr(layer, "input_size_per_partition", layer.input_size)
    identity = torch.eye(inner, dtype=layer.weight.dtype)
    return layer.quant_method.apply(layer, identity).t()  # type: ignore[no-any-return]


def _expert_packing(experts: Any) -> Any:
    from vllm._custom_ops import cpu_prepack_moe_weight

    return lambda stack: cpu_prepack_moe_weight(stack, experts.isa)


def _loader_shape(
    name: str, live: tuple[int, ...], model: ModelConfig, at: ShardCoordinates
) -> tuple[int, ...]:
    """The loader's shape of a parameter whose live shape may be a packed one."""
    inner = model.moe_intermediate_size // at.etp_size
    if name.endswith("w13_weight"):
        return (model.num_experts, 2 * inner, model.hidden_size)
    if name.endswith("w2_weight"):
        return (model.num_experts, model.hidden_size, inner)
    return live
