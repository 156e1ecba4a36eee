"""The twin of a large recipe: the same run, so small that two processes of a laptop hold it.

A twin is derived and not written down: architecture, algorithm with all its constants, optimizer,
precision, loss scale, what the trainer keeps, and the kinds of parallelism are the recipe's own;
sizes and lengths alone are made small. So a recipe that cannot run has a twin that cannot.
"""

from __future__ import annotations

import dataclasses

from megatron_precision.config.schema import ModelConfig, ParallelConfig, RunConfig

_PROMPT, _RESPONSE = 64, 24
_BUDGET = 3 * (_PROMPT + _RESPONSE) // 2


def twin(config: RunConfig, *, pipeline: bool = False) -> RunConfig:
    """The recipe's twin on two processes.

    Tensor, expert and sequence parallelism fit two processes at once; pipeline parallelism needs
    both for its stages.

    Args:
        config: a large recipe's.
        pipeline: keep its pipeline parallelism, and none of the other kinds.

    Raises:
        ValueError: where the recipe has no such kind.
    """
    if pipeline and config.parallel.pp_size == 1:
        raise ValueError(f"{config.recipe} has no pipeline parallelism")
    return dataclasses.replace(
        config,
        recipe=f"{config.recipe}.twin",
        model=_model(config.model),
        parallel=_pipeline(config.parallel) if pipeline else _sharded(config.parallel),
        task=dataclasses.replace(config.task, max_prompt_tokens=_PROMPT, scorer_workers=1),
        rollout=dataclasses.replace(
            config.rollout,
            max_response_tokens=_RESPONSE,
            max_num_seqs=min(64, config.rollout.max_num_seqs),
            kv_cache_mib=32,
        ),
        train=dataclasses.replace(
            config.train,
            iterations=2,
            prompts_per_iteration=4,
            rollouts_per_prompt=4,
            prompts_per_mini_batch=2,
            # Room for one sequence and a half: packs of unlike sizes.
            micro_batch_tokens=_BUDGET if config.train.micro_batch_tokens else 0,
        ),
        eval=dataclasses.replace(config.eval, every=0, samples_per_question=2),
    )


def _model(model: ModelConfig) -> ModelConfig:
    """The same architecture with no two sizes equal, such as vLLM's CPU kernels take."""
    experts = model.num_experts > 0
    return dataclasses.replace(
        model,
        vocab_size=75,
        # Qwen2 divides it into its heads; the others' heads have a width of their own.
        hidden_size=192 if model.model_type == "qwen2" else 96,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        initializer_range=0.15,  # an untrained model whose answers weights move
        max_position_embeddings=256,
        num_experts=4 if experts else 0,
        num_experts_per_tok=2 if experts else 0,
        moe_intermediate_size=128 if experts else 0,
    )


def _sharded(layout: ParallelConfig) -> ParallelConfig:
    return dataclasses.replace(
        layout,
        world_size=2,
        tp_size=min(2, layout.tp_size),
        pp_size=1,
        ep_size=min(2, layout.ep_size),
        etp_size=min(2, layout.etp_size),
        rollout_tp_size=min(2, layout.rollout_tp_size),
    )


def _pipeline(layout: ParallelConfig) -> ParallelConfig:
    return ParallelConfig(
        world_size=2,
        tp_size=1,
        pp_size=2,
        rollout_tp_size=min(2, layout.rollout_tp_size),
    )
