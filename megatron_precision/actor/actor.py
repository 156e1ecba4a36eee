"""Runs the trainer on one rank: a Megatron model, its optimizer, and three operations on them.

logprobs(batch)         a forward pass without gradients: old_logprobs
step(batch, plan, loss) forward, backward and one optimizer step on one mini-batch
weights                 the parameters, as regions of Hugging Face tensors
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func

from megatron_precision.actor.batch import Batch, MicroBatch, TokenLayout
from megatron_precision.actor.logprobs import response_logprobs
from megatron_precision.actor.models import (
    build_model,
    fuse_weight_gradients,
    implementation,
    of_params,
    transformer_config,
)
from megatron_precision.actor.optimizer import ActorOptimizer, OptimizerOutcome
from megatron_precision.actor.packing import (
    Packing,
    Plan,
    attention_tokens,
    dp_imbalance,
    padding_share,
    plan_micro_batches,
)
from megatron_precision.actor.parameters import HeldWeights
from megatron_precision.actor.routing import RouterFlips, Routing
from megatron_precision.config.schema import (
    LossScaleConfig,
    MemoryConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    RunConfig,
)
from megatron_precision.platform import startup
from megatron_precision.platform.choice import choose
from megatron_precision.precision.range_watch import RangeWatch


@dataclass
class MicroLoss:
    """The result of a loss function for one micro-batch.

    Attributes:
        loss: scalar FP32, already divided by the mini-batch's normaliser: the sum over all
            micro-batches and ranks is the loss.
        sums: quantities that add up over micro-batches and ranks.
        maxima: quantities of which the largest counts.
    """

    loss: torch.Tensor
    sums: dict[str, float]
    maxima: dict[str, float]


# (micro-batch, train_logprobs [b, w], entropy [b, w]) -> MicroLoss
LossFunction = Callable[[Batch, torch.Tensor, torch.Tensor], MicroLoss]


@dataclass(frozen=True)
class StepResult:
    """The result of one optimizer step over the whole job.

    Attributes:
        outcome: of the optimizer.
        loss: of the mini-batch.
        finite_forward: whether every loss and log-prob was finite.
        sums, maxima: from the loss function, reduced over the job.
        logprobs: [S, L] FP32 train_logprobs of the mini-batch's own rows, zero elsewhere; only on
            request.
    """

    outcome: OptimizerOutcome
    loss: float
    finite_forward: bool
    sums: dict[str, float]
    maxima: dict[str, float]
    logprobs: torch.Tensor | None


class Actor:
    """The trainer on this rank: model, optimizer, and the passes over a batch."""

    def __init__(
        self,
        config: RunConfig,
        optimizer: OptimizerConfig,
        loss_scale: LossScaleConfig,
    ) -> None:
        self._run = config
        self.policy = config.policy
        platform = choose().name
        model, layout, memory = config.model, config.parallel, config.memory
        kernels = of_params(config.kernels, self.policy.params)
        self.config = transformer_config(model, layout, self.policy, memory, kernels, platform)
        modules = implementation(kernels, platform)
        module = build_model(model, layout, self.config, memory, modules, self.policy.lm_head)
        if kernels.fused_weight_gradients:
            fuse_weight_gradients(module)
        self.range_watch = RangeWatch(module)
        self.routing = _routing(module, config) if config.records_routing else None
        self.model = DistributedDataParallel(
            self.config,
            DistributedDataParallelConfig(
                grad_reduce_in_fp32=self.policy.grad_accumulate == "fp32",
                use_distributed_optimizer=True,
                overlap_grad_reduce=False,
                overlap_param_gather=False,
            ),
            module,
        )
        self.optimizer = ActorOptimizer(
            [self.model], optimizer, loss_scale, self.policy, memory.optimizer_offload
        )
        self.config.grad_scale_func = self.optimizer.megatron.scale_loss
        # num_tokens is left out on purpose: the loss carries its own normaliser.
        self.config.finalize_model_grads_func = lambda chunks, _num_tokens=None, **groups: (
            finalize_model_grads(chunks, None, **groups)
        )
        self.weights = HeldWeights(self.model.module, self.optimizer, config)
        self._tp_group = parallel_state.get_tensor_model_parallel_group()
        self._device = startup.device()

    @property
    def model_config(self) -> ModelConfig:
        """The model's configuration."""
        return self._run.model

    # ---- passes --------------------------------------------------------------------------

    @property
    def packing(self) -> Packing:
        """The rule by which sequences are divided over ranks and into micro-batches."""
        return Packing(
            dp_size=parallel_state.get_data_parallel_world_size(),
            micro_batch_size=self._run.train.micro_batch_size,
            micro_batch_tokens=self._run.train.micro_batch_tokens,
            width_multiple=self._run.width_multiple,
            attention_tokens=attention_tokens(self._run.model),
            packed=self._run.train.packed_sequences,
        )

    def plans(self, batch: Batch, rows: torch.Tensor) -> list[Plan]:
        """Plan every data-parallel rank's micro-batches; all passes over the rows share them."""
        return plan_micro_batches(batch.lengths, rows, self.packing)

    def plan(self, batch: Batch, rows: torch.Tensor) -> Plan:
        """Plan this rank's micro-batches of the given sequences."""
        return self.plans(batch, rows)[parallel_state.get_data_parallel_rank()]

    def packing_metrics(self, batch: Batch, rows: torch.Tensor) -> dict[str, float]:
        """Return padding and imbalance of these sequences' plan, over the whole job."""
        plans = self.plans(batch, rows)
        return {
            "throughput/padding_share": padding_share(batch.lengths, plans),
            "throughput/dp_imbalance": dp_imbalance(batch.lengths, plans, self.packing),
        }

    def _forward_backward(
        self,
        batch: Batch,
        micro_batches: list[MicroBatch],
        on_logprobs: Callable[[Batch, MicroBatch, torch.Tensor, torch.Tensor], torch.Tensor],
        forward_only: bool,
        temperature: float | None = None,
    ) -> None:
        """Run Megatron's schedule; `on_logprobs` turns (micro-batch, log-probs) into a loss."""
        if temperature is None:
            temperature = self._run.rollout.temperature

        def forward_step(iterator, model):  # type: ignore[no-untyped-def]
            micro = next(iterator)
            part = batch.select(micro.rows, micro.width)
            assert not part.response_mask[:, 0].any(), "a response without a prompt"
            part = part.to(self._device)
            layout = TokenLayout.of(micro, part.lengths)
            tokens = layout.to_model(part.tokens)
            if self.routing is not None:
                assert part.routed_experts is None or torch.is_tensor(part.routed_experts)
                self.routing.micro_batch(part.routed_experts, layout, micro.rows)
            positions = torch.arange(micro.width, device=self._device).expand_as(part.tokens)
            output = model(
                tokens,
                layout.to_model(positions),
                attention_mask=None,
                packed_seq_params=layout.packed,
            )
            # One micro-batch is watched; a stage without the loss learns of its end here alone.
            self.range_watch.active = False

            def loss(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, dict[str, int]]:
                logprobs, entropies = response_logprobs(
                    logits,
                    tokens,
                    layout.to_model(part.response_mask, False),
                    temperature=temperature,
                    vocab_size=self._run.model.vocab_size,
                    tp_group=self._tp_group,
                )
                value = on_logprobs(
                    part, micro, layout.from_model(logprobs), layout.from_model(entropies)
                )
                return value, torch.tensor(0, dtype=torch.int), {}

            return output, loss

        if self.routing is not None:
            self.routing.begin_pass()
        widest = max(micro.width for micro in micro_batches)
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(micro_batches),
            model=[self.model],
            num_microbatches=len(micro_batches),
            seq_length=widest,
            micro_batch_size=len(micro_batches[0].rows),
            forward_only=forward_only,
        )

    def _flips_counted(self) -> contextlib.AbstractContextManager[None]:
        """Compare routers with the engine's in a block; its passes use the weights that sampled."""
        return contextlib.nullcontext() if self.routing is None else self.routing.counted()

    def router_flips(self) -> RouterFlips | None:
        """Return how routers differed from the engine's since the last call; None if unknown."""
        return None if self.routing is None else self.routing.take_flips()

    @torch.no_grad()
    def logprobs(
        self,
        batch: Batch,
        mini_batches: list[torch.Tensor],
        temperature: float | None = None,
    ) -> torch.Tensor:
        """Compute old_logprobs, [S, L] FP32, complete on every rank.

        Args:
            mini_batches: those that the steps will use: the same micro-batches give the same
                rounding, and the first step's ratio is exactly one.
            temperature: another one than the rollouts'.

        Raises:
            FloatingPointError: where a log-prob is not finite.
        """
        result = torch.zeros_like(batch.rollout_logprobs)

        def keep(
            part: Batch, micro: MicroBatch, lps: torch.Tensor, _h: torch.Tensor
        ) -> torch.Tensor:
            result[micro.rows, : micro.width] = lps[:, : result.shape[1]].to(result.device)
            return lps.sum()

        with self._flips_counted():
            for rows in mini_batches:
                plan = self.plan(batch, rows)
                self._forward_backward(batch, plan, keep, True, temperature=temperature)
        self.share(result)
        if not torch.isfinite(result).all():
            raise FloatingPointError(
                "trainer log-probs are not finite in a forward-only pass; the activations left "
                f"the range of {self.policy.params} (largest seen: {self.range_watch.act_max:.3g})"
            )
        return result

    @torch.no_grad()
    def forward(self, batch: Batch, micro: MicroBatch, into: torch.Tensor) -> None:
        """Compute one micro-batch's log-probs, as `logprobs` does, finite or not.

        Args:
            into: [S, L] FP32, written on the ranks that hold the loss; `share` completes it.
        """

        def keep(
            _part: Batch, micro: MicroBatch, lps: torch.Tensor, _h: torch.Tensor
        ) -> torch.Tensor:
            into[micro.rows, : micro.width] = lps[:, : into.shape[1]].to(into.device)
            return lps.sum()

        self._forward_backward(batch, [micro], keep, forward_only=True)

    def gradients(
        self,
        batch: Batch,
        micro_batches: list[MicroBatch],
        loss: LossFunction,
        keep_logprobs: bool = False,
    ) -> StepResult:
        """Run forward and backward over one mini-batch; gradients stay in `main_grad`."""
        self.model.zero_grad_buffer()
        self.optimizer.megatron.zero_grad()
        losses: list[torch.Tensor] = []
        sums: dict[str, float] = {}
        maxima: dict[str, float] = {}
        kept = torch.zeros_like(batch.rollout_logprobs) if keep_logprobs else None

        def evaluate(
            part: Batch, micro: MicroBatch, lps: torch.Tensor, entropies: torch.Tensor
        ) -> torch.Tensor:
            if kept is not None:
                values = lps.detach()[:, : kept.shape[1]]
                kept[micro.rows, : micro.width] = values.to(kept.device)
            result = loss(part, lps, entropies)
            losses.append(result.loss.detach())
            for name, value in result.sums.items():
                sums[name] = sums.get(name, 0.0) + value
            for name, value in result.maxima.items():
                maxima[name] = max(maxima.get(name, float("-inf")), value)
            return result.loss

        self.range_watch.begin(self._loss_rows(batch, micro_batches[0]), self._device)
        with self._flips_counted() if keep_logprobs else contextlib.nullcontext():
            self._forward_backward(batch, micro_batches, evaluate, forward_only=False)
        if kept is not None:
            self.share(kept)
        total, sums, maxima = self._reduce(losses, sums, maxima)
        return StepResult(
            OptimizerOutcome(False, float("nan"), self.optimizer.learning_rate),
            total,
            total == total and abs(total) != float("inf"),
            sums,
            maxima,
            kept,
        )

    def step(
        self,
        batch: Batch,
        micro_batches: list[MicroBatch],
        loss: LossFunction,
        keep_logprobs: bool = False,
    ) -> StepResult:
        """Take one optimizer step on a mini-batch, or skip it and change only the loss scale.

        Raises:
            FloatingPointError: for a loss that is not finite where no loss scale is in use; with
                one it is an overflow of the activations, and the step is skipped.
        """
        result = self.gradients(batch, micro_batches, loss, keep_logprobs)
        if not result.finite_forward and self.optimizer.loss_scale is None:
            raise FloatingPointError(
                f"the loss is {result.loss} in {self.policy.params}, which has the range of fp32: "
                "look at the weights and at the learning rate"
            )
        return replace(result, outcome=self.optimizer.step())

    def gradients_are_finite(self) -> bool:
        """Say whether this rank's accumulated gradients are all finite."""
        buffers = [*self.model.buffers, *self.model.expert_parallel_buffers]
        return all(bool(torch.isfinite(buffer.grad_data).all()) for buffer in buffers)

    # ---- helpers -------------------------------------------------------------------------

    def _loss_rows(self, batch: Batch, micro: MicroBatch) -> torch.Tensor | None:
        """Return the tokens whose logits carry loss, [s / sequence shards, c] bool."""
        if not self.policy.loss_scaling:
            return None
        part = batch.select(micro.rows, micro.width)
        predicts = part.predicts() & (part.advantages != 0)[:, None]
        layout = TokenLayout.of(micro, part.lengths)
        return layout.to_layers(predicts, False, _sequence_shard(self._run.parallel))

    def share(self, rows: torch.Tensor) -> None:
        """Sum each row from the one rank that computed it; in place, on every rank."""
        if not _owns_losses():
            rows.zero_()
        dist.all_reduce(rows)

    def _reduce(
        self, losses: list[torch.Tensor], sums: dict[str, float], maxima: dict[str, float]
    ) -> tuple[float, dict[str, float], dict[str, float]]:
        """Sum over the data-parallel ranks of the last stage, and send the result to every rank."""
        local = (float(torch.stack(losses).sum()), sums, maxima) if _owns_losses() else None
        everyone: list[tuple[float, dict[str, float], dict[str, float]] | None]
        everyone = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, local)
        parts = [part for part in everyone if part is not None]
        return (
            sum(part[0] for part in parts),
            {name: sum(part[1][name] for part in parts) for name in parts[0][1]},
            {name: max(part[2][name] for part in parts) for name in parts[0][2]},
        )


def _owns_losses() -> bool:
    """Say whether this rank reports its replica's losses; its peers have the same ones."""
    return (
        parallel_state.get_tensor_model_parallel_rank() == 0
        and parallel_state.is_pipeline_last_stage()
    )


def _routers_run_again(memory: MemoryConfig) -> bool:
    selected = memory.recompute == "selective" and "moe" in memory.recompute_modules
    return selected or memory.recompute == "full"


def _sequence_shard(layout: ParallelConfig) -> tuple[int, int]:
    """Return (rank, number of ranks) of sequence parallelism between tensor-parallel layers."""
    if not layout.sequence_parallel:
        return 0, 1
    return parallel_state.get_tensor_model_parallel_rank(), layout.tp_size


def _routing(module: torch.nn.Module, config: RunConfig) -> Routing:
    return Routing(
        module,
        num_layers=config.model.num_hidden_layers,
        replay=config.train.routing_replay,
        recompute=_routers_run_again(config.memory),
        shard=_sequence_shard(config.parallel),
    )
