"""What ranks of the tests import and what is not under test: imported once, then forked.

A world of Megatron Core and vLLM imports some 4,500 modules on every rank, two thirds of them
PyTorch's and others' that no patch of ours touches. Megatron Core, vLLM and our own packages are
not among these on the CPU: each rank imports them after its patches, as a rank of torchrun does.
"""

from __future__ import annotations

import importlib
import warnings

import torch

from megatron_precision.platform.choice import choose

_MODULES = """
torch torch._dynamo torch._inductor.lowering torch._inductor.codegen.triton
torch._inductor.kernel.flex torch.distributed.tensor torch.distributed.checkpoint
transformers.modeling_utils transformers.loss.loss_utils transformers.models.auto.modeling_auto
transformers.models.auto.tokenization_auto transformers.models.auto.processing_auto
openai.types.responses openai.lib.streaming wandb ray accelerate fastapi aiohttp
opentelemetry.sdk.trace tensorboard.compat.proto
"""
if choose().name == "cuda":
    # There nothing of these is patched before they are imported; and, since whether there is a GPU
    # is asked of the driver's library, none of them starts CUDA, which a fork would not survive.
    importlib.import_module("megatron_precision.rollout.vllm_versions").set_environment()
    _MODULES += """ megatron.core transformer_engine.pytorch xgrammar
    vllm.v1.engine.llm_engine vllm.v1.worker.gpu_model_runner"""
elif torch.version.cuda is None:  # where torch has it, importing this starts CUDA
    _MODULES += " xgrammar"

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    for _name in _MODULES.split():
        try:
            importlib.import_module(_name)
        except ModuleNotFoundError:  # the environment of a GPU host has others
            continue
