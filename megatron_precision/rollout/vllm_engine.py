"""Runs vLLM colocated: one engine per rank, in the trainer's own process.

It is thin on purpose: differences between versions of vLLM are in `vllm_versions.py` alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from megatron_precision.config.schema import RunConfig
from megatron_precision.layouts.megatron import ShardCoordinates
from megatron_precision.layouts.regions import Region
from megatron_precision.platform import startup
from megatron_precision.platform.choice import choose
from megatron_precision.platform.vllm_sampling import SampledLogprobs
from megatron_precision.precision.dtypes import torch_dtype
from megatron_precision.precision.policy import DType
from megatron_precision.rollout import vllm_versions
from megatron_precision.rollout.engine import Request, Rollout, Sampling
from megatron_precision.rollout.engine_weights import head_dtype
from megatron_precision.rollout.routed_experts import RoutedExperts
from megatron_precision.sync.plan import Planner

if TYPE_CHECKING:
    from megatron_precision.sync.transfer import Transfer

# vLLM's levels: 1 keeps the weights on the host, 2 forgets them; buffers are kept by both.
_SLEEP_LEVELS = {"off": 0, "keep_weights": 1, "drop_weights": 2}


def _vllm_name(dtype: DType) -> str:
    return str(torch_dtype(dtype)).removeprefix("torch.")


class VllmEngine:
    """This rank's shard of one vLLM replica.

    Args:
        config: the run's.
        model_dir: a Hugging Face checkpoint; its tensors are loaded, its config is believed.
        stop_ids: each ends a response.
    """

    def __init__(self, config: RunConfig, model_dir: Path, stop_ids: Sequence[int]) -> None:
        vllm_versions.set_environment()
        from vllm import EngineArgs, LLMEngine
        from vllm.config import WeightTransferConfig

        from megatron_precision.rollout import weight_transfer

        weight_transfer.register()
        platform = choose().name
        on_cpu = platform == "cpu"
        if on_cpu:
            from megatron_precision.platform import cpu

            cpu.apply_vllm_patches()
        policy, rollout, kernels = config.policy, config.rollout, config.kernels
        self._sleep_level = _SLEEP_LEVELS[config.memory.engine_sleep]
        self.weight_version = 0
        self._stop_ids = list(stop_ids)
        self._requests: dict[str, Request] = {}
        self._engine_ids: dict[str, str] = {}
        arguments = EngineArgs(
            model=str(model_dir),
            skip_tokenizer_init=True,
            dtype=_vllm_name(policy.rollout_params),
            # A dtype that vLLM names is that of a quantised cache: its "auto" is the model's.
            kv_cache_dtype="auto"
            if policy.kv_cache == policy.rollout_params
            else _vllm_name(policy.kv_cache),
            tensor_parallel_size=config.parallel.rollout_tp_size,
            distributed_executor_backend="external_launcher",
            enforce_eager=not kernels.cuda_graphs,
            enable_sleep_mode=self._sleep_level > 0,
            max_model_len=config.max_sequence_tokens,
            max_num_seqs=rollout.max_num_seqs,
            # On the CPU a seeded request fails where its prompt is taken in chunks
            # (docs/upstream/vllm_cpu_chunked_seeds.md); without, vLLM wants room for a sequence.
            enable_chunked_prefill=not on_cpu,
            max_num_batched_tokens=max(
                rollout.max_num_batched_tokens, config.max_sequence_tokens * on_cpu
            ),
            hf_overrides={"head_dtype": _vllm_name(policy.rollout_lm_head)}
            if policy.rollout_lm_head != policy.rollout_params
            else {},
            **vllm_versions.platform_arguments(platform, rollout.kv_cache_mib * 2**20),
            logprobs_mode="processed_logprobs",
            disable_cascade_attn=not kernels.cascade_attention,
            enable_prefix_caching=rollout.prefix_caching,
            weight_transfer_config=WeightTransferConfig(backend=weight_transfer.BACKEND),
            disable_log_stats=True,
            use_tqdm_on_load=False,
            async_scheduling=False,
            seed=config.seed,
        )
        # vLLM seeds the process's generators and caps its threads while it starts.
        states = random.getstate(), np.random.get_state(), torch.get_rng_state()
        set_num_threads = torch.set_num_threads
        self.llm = LLMEngine.from_engine_args(arguments)
        torch.set_num_threads = set_num_threads
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        self._sampled_logprobs = SampledLogprobs(self._runner, vllm_versions.bookkeeping_places())
        self._routed_experts: RoutedExperts | None = None
        if config.records_routing:
            model = config.model
            self._routed_experts = RoutedExperts(
                self._runner, model.num_hidden_layers, model.num_experts_per_tok
            )
        self._largest = torch.zeros((), dtype=torch.float32, device=startup.device())
        if not kernels.cuda_graphs:  # what is replayed calls no hook
            self._watch_range()

    # ---- RolloutEngine -------------------------------------------------------------------

    def submit(self, requests: Sequence[Request], sampling: Sampling) -> None:
        """Queue requests; every rank of the replica submits the same ones in the same order."""
        from vllm import SamplingParams, TokensPrompt
        from vllm.sampling_params import RequestOutputKind

        for request in requests:
            name = f"{request.prompt}-{request.rollout}-{request.seed:x}"
            parameters = SamplingParams(
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                seed=request.seed,
                logprobs=0 if sampling.logprobs else None,
                flat_logprobs=sampling.logprobs,
                stop_token_ids=self._stop_ids,
                detokenize=False,
                output_kind=RequestOutputKind.FINAL_ONLY,
                skip_clone=True,  # made for this request: no deep copy to guard it
            )
            prompt = TokensPrompt(prompt_token_ids=list(request.prompt_tokens))
            self._engine_ids[name] = self.llm.add_request(name, prompt, parameters)
            self._requests[name] = request
            if self._routed_experts is not None and sampling.logprobs:  # to be trained on
                self._routed_experts.watch(self._engine_ids[name])

    def step(self) -> list[Rollout]:
        """Run one scheduler step, and return the rollouts that it finished."""
        return [self._collect(output) for output in self.llm.step() if output.finished]

    def abort(self) -> None:
        """Drop all unfinished requests."""
        self.llm.abort_request(list(self._requests))
        self._requests.clear()
        self._engine_ids.clear()
        self._sampled_logprobs.clear()
        if self._routed_experts is not None:
            self._routed_experts.clear()

    @property
    def unfinished(self) -> int:
        """Requests that are queued or running."""
        return len(self._requests)

    def update_weights(self, weight_version: int) -> None:
        """Update the weights by the connected plan, and drop all cached prefixes.

        Raises:
            RuntimeError: with requests in flight, or where vLLM keeps its prefix cache.
        """
        if self._requests:
            raise RuntimeError(
                f"{len(self._requests)} rollouts are in flight; collect or abort them before a sync"
            )
        self.llm.collective_rpc("start_weight_update")
        self.llm.collective_rpc("update_weights", kwargs={"update_info": {}})
        self.llm.collective_rpc("finish_weight_update")
        if not self.llm.reset_prefix_cache():
            raise RuntimeError("vLLM kept its prefix cache over a weight sync")
        self.weight_version = weight_version

    def sleep(self) -> None:
        """Free the KV cache, and the weights as `memory.engine_sleep` says.

        Raises:
            RuntimeError: with requests in flight.
        """
        if not self._sleep_level:
            return
        if self._requests:
            raise RuntimeError(f"{len(self._requests)} rollouts are in flight; they need the cache")
        self.llm.sleep(self._sleep_level)

    def wake(self, part: Literal["weights", "kv_cache"]) -> None:
        """Allocate again: weights before a sync, the KV cache after the trainer is offloaded."""
        if not self._sleep_level:
            return
        self.llm.wake_up([part])
        if part == "weights" and self._sleep_level == _SLEEP_LEVELS["drop_weights"]:
            # The memory is another: rows of padding, which no sync writes, must not hold NaN.
            for parameter in self.model.parameters():
                parameter.data.zero_()

    # ---- for the proof and the audit -----------------------------------------------------

    def connect(
        self,
        planner: Planner,
        sources: list[tuple[Region, torch.Tensor]],
        **options: Any,
    ) -> Transfer:
        """Bind a plan to this rank's trainer and engine; `options` are those of `Transfer`."""
        init_info = {
            "planner": planner,
            "sources": sources,
            "at": self.coordinates(),
            **options,
        }
        self.llm.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": init_info})
        worker = self.llm.model_executor.driver_worker.worker
        return worker.weight_transfer_engine.transfer

    @property
    def model(self) -> torch.nn.Module:
        """The live model of this rank."""
        return self._runner.get_model()

    @property
    def head_dtype(self) -> torch.dtype:
        """The dtype in which the output projection multiplies."""
        return head_dtype(self.model)

    def coordinates(self) -> ShardCoordinates:
        """Return this rank's coordinates in the engine's layout."""
        from vllm.distributed import get_tp_group

        group = get_tp_group()
        return ShardCoordinates(
            tp_rank=group.rank_in_group,
            tp_size=group.world_size,
            etp_rank=group.rank_in_group,
            etp_size=group.world_size,
        )

    @property
    def kv_caches(self) -> list[torch.Tensor]:
        """The live KV cache of every layer."""
        return [cache for cache in self._runner.kv_caches if isinstance(cache, torch.Tensor)]

    def score(self, prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """Score each prompt's own tokens after the first, at temperature 1.

        Returns:
            One list a prompt, of its length minus one.
        """
        from vllm import SamplingParams, TokensPrompt

        self.llm.reset_prefix_cache()
        for number, tokens in enumerate(prompts):
            self.llm.add_request(
                f"score-{number:06d}",
                TokensPrompt(prompt_token_ids=list(tokens)),
                SamplingParams(max_tokens=1, temperature=1.0, prompt_logprobs=0, detokenize=False),
            )
        done: dict[int, list[float]] = {}
        while len(done) < len(prompts):
            for output in self.llm.step():
                if output.finished:
                    row = output.prompt_logprobs
                    number = int(output.request_id.split("-")[1])
                    done[number] = [
                        row[t][prompts[number][t]].logprob for t in range(1, len(prompts[number]))
                    ]
        return [done[number] for number in range(len(prompts))]

    @property
    def act_max(self) -> float:
        """The largest absolute activation so far; see `_watch_range`."""
        return float(self._largest)

    @act_max.setter
    def act_max(self, value: float) -> None:
        self._largest.fill_(value)

    def take_act_max(self) -> float:
        """Return the largest absolute activation since the last call; see `_watch_range`."""
        largest = self.act_max
        self.act_max = 0.0
        return largest

    # ---- helpers -------------------------------------------------------------------------

    @property
    def _runner(self) -> Any:
        return self.llm.model_executor.driver_worker.worker.model_runner

    def _watch_range(self) -> None:
        """Watch the residual stream and the inputs of down projections, as the trainer does.

        Fused experts show their input and output only.
        """

        # On the device: a number asked for after every layer would have a GPU wait for the host.
        largest = self._largest

        def record(tensor: torch.Tensor) -> None:
            if tensor.numel():
                torch.maximum(largest, tensor.abs().amax().float(), out=largest)  # nan stays

        for name, module in self.model.named_modules():
            leaf = name.rpartition(".")[2]
            if leaf == "down_proj":
                module.register_forward_pre_hook(lambda _module, inputs: record(inputs[0]))
            elif leaf.isdigit() and name.rpartition(".")[0].endswith("layers"):
                # A decoder layer returns (output of its MLP, residual stream before it).
                module.register_forward_hook(
                    lambda _module, _inputs, output: record(output[0] + output[1])
                )

    def _collect(self, output: Any) -> Rollout:
        request = self._requests.pop(output.request_id)
        completion = output.outputs[0]
        tokens = tuple(completion.token_ids)
        engine_id = self._engine_ids.pop(output.request_id)
        logprobs = self._sampled_logprobs.pop(engine_id)
        if completion.logprobs is not None and len(logprobs) != len(tokens):
            raise RuntimeError(
                f"{output.request_id}: {len(tokens)} tokens and {len(logprobs)} log-probs of them"
            )
        return Rollout(
            request=request,
            tokens=tokens,
            rollout_logprobs=logprobs,
            truncated=completion.finish_reason == "length",
            weight_version=self.weight_version,
            routed_experts=(
                None
                if self._routed_experts is None
                else self._routed_experts.pop(engine_id, len(request.prompt_tokens) + len(tokens))
            ),
        )
