"""Checks what a configuration asks of a platform that the platform cannot do.

A configuration is valid or not wherever it is read (`checks/settings.py`), also a cluster's on a
laptop. Only a process that is about to run it refuses what its platform lacks.
"""

from __future__ import annotations

from collections.abc import Iterator

from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.schema import TRANSFORMER_ENGINE_FUSIONS, RunConfig
from megatron_precision.platform.choice import Choice, choose


def platform_problems(config: RunConfig, choice: Choice) -> Iterator[Problem]:
    """List settings that need a GPU on the CPU, and on CUDA those that its kernels refuse."""
    memory, kernels = config.memory, config.kernels
    if choice.name == "cuda":
        scores = memory.attention == "scores" and kernels.trainer != "local"
        scores = scores and config.policy.params != "fp32"
        if config.train.packed_sequences and scores:
            yield Problem(
                what="Transformer Engine would write a padded grid of packed sequences' scores",
                where="train.packed_sequences, memory.attention",
                got="memory.attention=scores",
                expected="memory.attention=fused, or kernels.trainer=local",
            )
        if kernels.trainer == "transformer_engine" and config.policy.params == "fp32":
            yield Problem(
                what="Transformer Engine multiplies FP32 in TF32",
                where="kernels.trainer",
                got=f"transformer_engine with the precision {config.precision}",
                expected="auto or local, or a 16-bit trainer",
            )
        if kernels.trainer == "auto" and config.policy.params == "fp32":
            for name in TRANSFORMER_ENGINE_FUSIONS:
                if getattr(kernels, name):
                    yield Problem(
                        what="a kernel of Transformer Engine, which an FP32 trainer has not",
                        where=f"kernels.{name}",
                        got=f"true with the precision {config.precision}",
                        expected="false, or a 16-bit trainer",
                    )
        return
    for path, value, neutral in (
        ("memory.optimizer_offload", memory.optimizer_offload, 0.0),
        ("memory.engine_sleep", memory.engine_sleep, "off"),
        ("memory.offload_trainer", memory.offload_trainer, False),
        ("kernels.cuda_graphs", kernels.cuda_graphs, False),
        *((f"kernels.{n}", getattr(kernels, n), False) for n in TRANSFORMER_ENGINE_FUSIONS),
    ):
        if value != neutral:
            yield Problem(
                what="only a GPU can do this",
                where=path,
                got=f"{value} on the CPU platform ({choice.reason})",
                expected=str(neutral),
                remedy=f"--set {path}={str(neutral).lower()}, or a GPU host (docs/gpu.md)",
            )


def check(config: RunConfig) -> None:
    """Refuse a configuration that this process's platform cannot run, before an engine loads.

    Raises:
        UserError: listing everything.
    """
    found = list(platform_problems(config, choose()))
    if found:
        raise UserError(found)
