"""Builds Megatron models from a Hugging Face shaped config: configuration, layer spec, GPTModel.

There are two layer specs with the same mathematics. The local one has Megatron's own modules with
an RMSNorm of ours, and runs everywhere. Transformer Engine's fuses each norm into the next linear
layer, has fused attention and multiplies all experts at once. The configuration or the platform
chooses one, never what happens to be installed.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.extensions import transformer_engine
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_with_transformer_engine_spec,
    get_mlp_module_spec_for_backend,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnBackend, AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_precision.actor.modules import FusedAttention, RMSNorm, ScoresAttention, widen
from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.schema import (
    TRANSFORMER_ENGINE_FUSIONS,
    KernelConfig,
    MemoryConfig,
    ModelConfig,
    ParallelConfig,
)
from megatron_precision.layouts.architectures import architecture
from megatron_precision.layouts.megatron import padded_vocab_size
from megatron_precision.platform.choice import Platform, installed
from megatron_precision.precision.dtypes import torch_dtype
from megatron_precision.precision.policy import DType, PrecisionPolicy

# Checkpoints use the names of Transformer Engine's layer spec, which fuses a norm into the linear
# layer after it; with experts the norm before them stands alone there too.
_CHECKPOINT_NAMES = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_DENSE = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


Implementation = Literal["local", "transformer_engine"]


def of_params(kernels: KernelConfig, params: DType) -> KernelConfig:
    """Choose the kernels of a model by the dtype of its parameters.

    Transformer Engine multiplies FP32 in TF32 (`cublas_gemm`, which no flag of torch's reaches):
    ten bits. Left to itself an FP32 model, of a warm start or of a reference, has none of it.
    """
    if params != "fp32" or kernels.trainer != "auto":
        return kernels
    without = dict.fromkeys(TRANSFORMER_ENGINE_FUSIONS, False)
    return dataclasses.replace(kernels, trainer="local", **without)


def implementation(kernels: KernelConfig, platform: Platform) -> Implementation:
    """Choose whose modules the trainer's layers are made of.

    Raises:
        UserError: for Transformer Engine on the CPU or where it cannot be imported, and for its
            fusions without it.
    """
    wanted = kernels.trainer
    if wanted == "auto":
        wanted = "transformer_engine" if platform == "cuda" else "local"
    found = [
        Problem(
            what="a kernel of Transformer Engine without Transformer Engine",
            where=f"kernels.{name}",
            got=f"true with the trainer's {wanted} modules",
            expected="false, or kernels.trainer=transformer_engine on a GPU",
        )
        for name in TRANSFORMER_ENGINE_FUSIONS
        if getattr(kernels, name) and wanted == "local"
    ]
    if wanted == "transformer_engine" and (platform == "cpu" or not transformer_engine.HAVE_TE):
        version = installed("transformer-engine")
        found.append(
            Problem(
                what="Transformer Engine cannot be used",
                where="kernels.trainer",
                got=f"{kernels.trainer} on the platform {platform}; transformer-engine is "
                + (f"{version}" if version else "not installed"),
                expected="a GPU and a Transformer Engine built against the installed torch",
                remedy="python -m megatron_precision doctor says what is wrong with it; "
                "kernels.trainer=local trains with Megatron's own modules",
            )
        )
    if found:
        raise UserError(found)
    return wanted


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    policy: PrecisionPolicy,
    memory: MemoryConfig,
    kernels: KernelConfig = KernelConfig(),  # noqa: B008 (frozen)
    platform: Platform = "cpu",
) -> TransformerConfig:
    """Build Megatron's config. Fusions are off unless asked for: their rounding differs.

    Megatron's fused cross entropy is never used (its backward casts to BF16): log-probs are
    `actor/logprobs.py`'s.

    Raises:
        UserError: see `implementation`.
    """
    dtype = torch_dtype(policy.params)
    te = implementation(kernels, platform) == "transformer_engine"
    moe = (
        {
            "num_moe_experts": model.num_experts,
            "moe_router_topk": model.num_experts_per_tok,
            "moe_ffn_hidden_size": model.moe_intermediate_size,
            # Softmax over the chosen experts equals a full softmax renormalised over them.
            "moe_router_pre_softmax": not model.norm_topk_prob,
            "moe_router_score_function": "softmax",
            "moe_router_dtype": policy.router,
            "moe_router_load_balancing_type": "none",
            "moe_aux_loss_coeff": 0.0,
            "moe_grouped_gemm": te,
            "moe_permute_fusion": kernels.fused_permute,
        }
        if model.num_experts
        else {}
    )
    recompute: dict[str, dict[str, Any]] = {
        "none": {},
        "selective": {
            "recompute_granularity": "selective",
            "recompute_modules": list(memory.recompute_modules),
        },
        "full": {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    }
    # Chooses among Transformer Engine's kernels. Megatron writes it into the process's environment
    # and refuses another choice there: every model of a process asks for the same, read or not.
    scores = platform == "cuda" and memory.attention == "scores"
    return TransformerConfig(
        num_layers=model.num_hidden_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.intermediate_size,
        num_attention_heads=model.num_attention_heads,
        num_query_groups=model.num_key_value_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.rms_norm_eps,
        init_method_std=model.initializer_range,
        qk_layernorm=architecture(model).qk_norm,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        add_qkv_bias=architecture(model).qkv_bias,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tp_size,
        pipeline_model_parallel_size=parallel.pp_size,
        expert_model_parallel_size=parallel.ep_size,
        expert_tensor_parallel_size=parallel.etp_size,
        sequence_parallel=parallel.sequence_parallel,
        variable_seq_lengths=parallel.pp_size > 1,
        # Checked by Megatron for dense models too: the default refuses variable lengths.
        moe_token_dispatcher_type="alltoall",
        params_dtype=dtype,
        pipeline_dtype=dtype,
        autocast_dtype=dtype,
        fp16=policy.params == "fp16",
        bf16=policy.params == "bf16",
        attention_softmax_in_fp32=True,
        # The loss carries its own normaliser; Megatron is to sum over micro-batches and ranks.
        calculate_per_token_loss=True,
        attention_backend=AttnBackend.unfused if scores else AttnBackend.auto,
        use_cpu_initialization=platform == "cpu",
        bias_activation_fusion=kernels.fused_activation,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=kernels.fused_rope,
        cross_entropy_loss_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **moe,
        **recompute[memory.recompute],
    )


def layer_spec(
    model: ModelConfig,
    config: TransformerConfig,
    memory: MemoryConfig,
    modules: Implementation = "local",
) -> ModuleSpec:
    """Build a layer's spec: Transformer Engine's modules, or Megatron's with our RMSNorm."""
    if modules == "transformer_engine":
        return get_gpt_layer_with_transformer_engine_spec(
            num_experts=model.num_experts or None,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=architecture(model).qk_norm,
        )
    backend = LocalSpecProvider()
    writes_scores = (config.fp16 or config.bf16) and memory.attention == "scores"
    head_norm = RMSNorm if architecture(model).qk_norm else IdentityOp
    mlp = get_mlp_module_spec_for_backend(
        backend=backend, num_experts=model.num_experts or None, moe_grouped_gemm=False
    )
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=backend.column_parallel_linear(),
                    core_attention=ScoresAttention if writes_scores else FusedAttention,
                    linear_proj=backend.row_parallel_linear(),
                    q_layernorm=head_norm,
                    k_layernorm=head_norm,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map=_CHECKPOINT_NAMES | ({} if model.num_experts else _DENSE),
        ),
    )


def fuse_weight_gradients(model: torch.nn.Module) -> None:
    """Let Transformer Engine's products add to the gradients' buffer.

    Megatron's own option (`gradient_accumulation_fusion`) wants Apex's kernel for the output layer,
    which is none of Transformer Engine's; here that one adds afterwards.
    """
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def build_model(
    model: ModelConfig,
    parallel: ParallelConfig,
    config: TransformerConfig,
    memory: MemoryConfig,
    modules: Implementation = "local",
    lm_head: DType | None = None,
) -> torch.nn.Module:
    """Build this rank's stage of the model; Megatron initialises its parameters.

    Args:
        lm_head: dtype of the output projection; the parameters' where it is not said.
    """
    spec = layer_spec(model, config, memory, modules)
    norm = transformer_engine.TENorm if modules == "transformer_engine" else RMSNorm
    local_layers = model.num_hidden_layers // parallel.pp_size
    last = parallel_state.is_pipeline_last_stage()
    built = GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[spec] * local_layers, layer_norm=norm
        ),
        vocab_size=padded_vocab_size(model.vocab_size, parallel.tp_size),
        max_sequence_length=model.max_position_embeddings,
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=last,
        parallel_output=True,
        share_embeddings_and_output_weights=model.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=int(model.rope_theta),
        rope_scaling=model.rope_scaling_factor != 1.0,
        rope_scaling_factor=model.rope_scaling_factor,
    )
    if last and lm_head is not None and torch_dtype(lm_head) != config.params_dtype:
        assert lm_head == "fp32", "the policy widens the head, and does nothing else to it"
        widen(built.output_layer)
    return built
