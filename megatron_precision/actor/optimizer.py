"""Wraps Megatron's optimizer: one loss scale for its whole chain, and steps that can be skipped."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.optimizer import MegatronOptimizer

from megatron_precision.actor.parallel import agree_any
from megatron_precision.config.schema import LossScaleConfig, OptimizerConfig
from megatron_precision.precision.dtypes import torch_dtype
from megatron_precision.precision.loss_scale import LossScale
from megatron_precision.precision.policy import PrecisionPolicy


@dataclass(frozen=True)
class OptimizerOutcome:
    """The result of an optimizer step.

    Attributes:
        skipped: an overflow was found; weights and optimizer state are as before.
        grad_norm: L2 norm over all parameters, before clipping; nan where skipped.
        learning_rate: the rate that was, or would have been, applied.
    """

    skipped: bool
    grad_norm: float
    learning_rate: float


# The name of a main copy among a parameter's states; the others are AdamW's moments.
MAIN = "param"
# Among them in Megatron's optimizers: how many steps, and the main copy under another name.
_NO_STATE = ("step", "master_param")


@dataclass(frozen=True)
class FlatState:
    """This rank's range of a parameter's main copy and moments.

    Attributes:
        begin, end: of the parameter's elements, in row-major order; equal where other ranks have
            all of them.
        tensors: FP32, flat, by name; no moments before the first step.
    """

    begin: int
    end: int
    tensors: dict[str, torch.Tensor]


@dataclass(frozen=True)
class MainCopy:
    """This rank's range of a parameter's FP32 main copy.

    Attributes:
        begin: the first of the parameter's elements, in row-major order.
        values: FP32, flat; empty where other ranks have all of it.
    """

    begin: int
    values: torch.Tensor


class ActorOptimizer:
    """AdamW on FP32 main parameters, sharded by Megatron's distributed optimizer."""

    def __init__(
        self,
        chunks: list[torch.nn.Module],
        optimizer: OptimizerConfig,
        loss_scale: LossScaleConfig,
        policy: PrecisionPolicy,
        offload: float = 0.0,
    ) -> None:
        """
        Args:
            offload: share of the state that is kept, and updated, on the host.
        """
        self._config = optimizer
        self.applied_steps = 0
        # In a row, with no loss scale to lower.
        self.hopeless_overflows = 0
        self._device = next(chunks[0].parameters()).device
        self._aside: list[tuple[dict[str, torch.Tensor], str]] = []
        initial = loss_scale.starting_scale if policy.loss_scaling else None
        self.megatron: MegatronOptimizer = get_megatron_optimizer(
            MegatronOptimizerConfig(
                optimizer="adam",
                lr=optimizer.learning_rate,
                weight_decay=optimizer.weight_decay,
                adam_beta1=optimizer.beta1,
                adam_beta2=optimizer.beta2,
                adam_eps=optimizer.eps,
                clip_grad=optimizer.clip_grad,
                params_dtype=torch_dtype(policy.params),
                fp16=policy.params == "fp16",
                bf16=policy.params == "bf16",
                initial_loss_scale=initial,
                min_loss_scale=loss_scale.min_scale,
                loss_scale_window=loss_scale.good_steps_to_grow,
                hysteresis=loss_scale.hysteresis,
                use_distributed_optimizer=True,
                overlap_param_gather=False,
                optimizer_cpu_offload=offload > 0,
                optimizer_offload_fraction=offload,
                pin_cpu_grads=self._device.type == "cuda",
                log_num_zeros_in_grad=False,
            ),
            chunks,
        )
        self.loss_scale: LossScale | None = None
        if initial is not None:
            self.loss_scale = LossScale(
                initial, loss_scale.good_steps_to_grow, loss_scale.hysteresis, loss_scale.min_scale
            )
            for member in self.members:
                member.grad_scaler = self.loss_scale

    @property
    def members(self) -> list[MegatronOptimizer]:
        """The members of the chain: dense parameters, and experts if there are any."""
        return list(getattr(self.megatron, "chained_optimizers", [self.megatron]))

    @property
    def learning_rate(self) -> float:
        """The next step's learning rate: constant after a linear warm-up over applied steps."""
        warmup = self._config.warmup_steps
        share = min(1.0, (self.applied_steps + 1) / warmup) if warmup else 1.0
        return self._config.learning_rate * share

    @torch.no_grad()
    def step(self) -> OptimizerOutcome:
        """Unscale the gradients, and update every member, or skip all of them on an overflow."""
        learning_rate = self.learning_rate
        # A member's flag is agreed over its own group only; a step is taken by the whole world.
        overflow = agree_any(bool(self.megatron.prepare_grads()))
        hopeless = overflow and (self.loss_scale is None or self.loss_scale.at_minimum)
        self.hopeless_overflows = self.hopeless_overflows + 1 if hopeless else 0
        if self.loss_scale is not None:
            self.loss_scale.commit(overflow)
        if overflow:
            return OptimizerOutcome(True, float("nan"), learning_rate)
        grad_norm = float(self.megatron.get_grad_norm())
        for member in self.members:
            parameters = member.get_parameters()
            if parameters and self._config.clip_grad > 0:
                clip_grad_by_total_norm_fp32(
                    parameters, max_norm=self._config.clip_grad, total_norm=grad_norm
                )
        for group in self.megatron.param_groups:
            group["lr"] = learning_rate * group.get("lr_mult", 1.0)
        self.megatron.step_with_ready_grads()
        self.applied_steps += 1
        return OptimizerOutcome(False, grad_norm, learning_rate)

    def main_copy(self, parameter: torch.nn.Parameter) -> MainCopy | None:
        """Return this rank's range of a parameter's main copy; None if it has none.

        Raises:
            RuntimeError: where the optimizer keeps it to itself (a precision-aware one).
        """
        if not hasattr(parameter, "main_param_sharded"):
            return None
        for member in self.members:
            if parameter in getattr(member, "model_param_gbuf_map", {}):
                if parameter.main_param is None:
                    raise RuntimeError("the optimizer holds the main parameters inside its kernels")
                held = member._get_model_param_range_map(parameter)["param"]
                return MainCopy(held.start, parameter.main_param.data)
        return MainCopy(0, torch.empty(0, device=parameter.device))

    def flat_state(self, parameter: torch.nn.Parameter) -> FlatState:
        """This rank's range of a parameter's main copy and moments.

        An FP32 parameter is its own main copy.
        """
        for member in self.members:
            if parameter in getattr(member, "model_param_gbuf_map", {}):
                held = member._get_model_param_range_map(parameter)["param"]
                states = member._get_main_param_and_optimizer_states(parameter)
                tensors = {n: state for n, state in states.items() if n not in _NO_STATE}
                return FlatState(held.start, held.end, {n: t.data for n, t in tensors.items()})
        return FlatState(0, 0, {})

    @torch.no_grad()
    def make_states(self, applied_steps: int) -> None:
        """Create moments for every main copy, as after some steps; their values are loaded next.

        Megatron makes them by a step without gradients, which decays the main copies.
        """
        self.applied_steps = applied_steps
        if not applied_steps:
            return
        for member in self.members:
            member._init_optimizer_states_with_dummy_values()
            # On both devices, where a share of it is on the host.
            for inner in getattr(member.optimizer, "sub_optimizers", [member.optimizer]):
                for state in inner.state.values():
                    if torch.is_tensor(state.get("step")):  # torch's AdamW
                        state["step"].fill_(float(applied_steps))
                for group in inner.param_groups:
                    if "step" in group:  # Transformer Engine's and Apex's
                        group["step"] = applied_steps

    @torch.no_grad()
    def reload_main_params(self) -> None:
        """Copy the model's weights into the FP32 main parameters, after they were loaded."""
        self.megatron.reload_model_params()
        for member in self.members:
            if not isinstance(member.optimizer, HybridDeviceOptimizer):
                continue
            # Megatron Core 0.16.1 returns before its copy here: it expects 16-bit optimizers.
            halves, mains = member.model_float16_groups, member.shard_fp32_from_float16_groups
            for parameters, copies in zip(halves, mains, strict=True):
                for parameter, copy in zip(parameters, copies, strict=True):
                    held = member._get_model_param_range_map(parameter)["param"]
                    copy.data.copy_(parameter.data.view(-1)[held.start : held.end])
        self.main_copies_changed()

    @torch.no_grad()
    def main_copies_changed(self) -> None:
        """Update the host's copies of the main copies, after these were written.

        With `memory.optimizer_offload` a step is taken there, and written over the main copies.
        """
        for inner in self._inner():
            for main, host in getattr(inner, "gpu_params_map_cpu_copy", {}).items():
                host.data.copy_(main.data)

    def step_aside(self) -> None:
        """Move to the host what is on the GPU, until `come_back`.

        Megatron's own way back moves everything to the GPU, and with it what lives on the host
        (`memory.optimizer_offload`; Megatron Core 0.16.1).
        """
        for inner in self._inner():
            for group in inner.param_groups:
                for main in group["params"]:
                    main.data = main.data.cpu()
            for state in inner.state.values():
                for name, value in state.items():
                    if torch.is_tensor(value) and value.is_cuda and name not in _NO_STATE:
                        state[name] = value.cpu()
                        self._aside.append((state, name))

    def come_back(self) -> None:
        """Take back what `step_aside` moved."""
        for inner in self._inner():
            for group in inner.param_groups:
                for main in group["params"]:
                    main.data = main.data.to(self._device)
        for state, name in self._aside:
            state[name] = state[name].to(self._device)
        self._aside.clear()

    def _inner(self) -> list[torch.optim.Optimizer]:
        """Return the members' own optimizers; a member without parameters here has none."""
        return [member.optimizer for member in self.members if member.optimizer is not None]
