"""Megatron models from a Hugging Face shaped config: TransformerConfig, layer spec, GPTModel."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_mlp_module_spec_for_backend
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
)

from megatron_precision.actor.attention import FusedAttention
from megatron_precision.actor.norm import RMSNorm
from megatron_precision.config import MemoryConfig, ModelConfig, ParallelConfig
from megatron_precision.precision.dtypes import torch_dtype
from megatron_precision.precision.policy import PrecisionPolicy
from megatron_precision.weights.architectures import architecture
from megatron_precision.weights.megatron_layout import padded_vocab_size

# Checkpoints use the names of Transformer Engine's layer spec, which fuses a norm into the linear
# layer after it; with experts the norm before them stands alone there too.
_CHECKPOINT_NAMES = {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
_DENSE = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, policy: PrecisionPolicy, memory: MemoryConfig
) -> TransformerConfig:
    """Megatron's config of a model. Fusions are off: they differ by platform and dtype."""
    dtype = torch_dtype(policy.params)
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
            "moe_grouped_gemm": False,
        }
        if model.num_experts
        else {}
    )
    recompute = (
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
        if memory.recompute == "full"
        else {}
    )
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
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        **moe,
        **recompute,
    )


def layer_spec(model: ModelConfig, config: TransformerConfig, memory: MemoryConfig) -> ModuleSpec:
    """Megatron's own modules with an RMSNorm that knows sequence parallelism."""
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
                    core_attention=backend.core_attention() if writes_scores else FusedAttention,
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


def build_model(
    model: ModelConfig, parallel: ParallelConfig, config: TransformerConfig, memory: MemoryConfig
) -> torch.nn.Module:
    """This rank's stage of the model, parameters initialised by Megatron."""
    spec = layer_spec(model, config, memory)
    local_layers = model.num_hidden_layers // parallel.pp_size
    last = parallel_state.is_pipeline_last_stage()
    return GPTModel(
        config=config,
        transformer_layer_spec=TransformerBlockSubmodules(
            layer_specs=[spec] * local_layers, layer_norm=RMSNorm
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
