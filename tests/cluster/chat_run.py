"""The tiny dense recipe on a checkpoint with random weights: two iterations, a rank a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.e2e import real_jobs

SETTINGS = {
    "task.name": "chat",
    "start.kind": "checkpoint",
    "start.checkpoint": "model",
    "task.train_sets": "sums=sums.jsonl",
    "task.scorer": "chat_scorers:parity",
    "rollout.max_response_tokens": "16",
    "rollout.max_num_seqs": "32",
    "rollout.kv_cache_mib": "32",
    # Tensor parallelism of the trainer spans the machines; an engine does not.
    "parallel.rollout_tp_size": "1",
    "train.iterations": "2",
    "train.prompts_per_iteration": "4",
    "train.rollouts_per_prompt": "4",
    "train.prompts_per_mini_batch": "2",
    "eval.every": "0",
}
WORDS = [f"{name}={value}" for name, value in SETTINGS.items()]
E2E = Path(real_jobs.__file__).parent


def assert_trained(out: Path) -> None:
    """Two iterations, and a verified sync after each of them."""
    found: list[dict[str, Any]] = real_jobs.events(out, "iteration")
    assert [event["sync/verified"] for event in found] == [1, 1]
    assert all(event["mismatch/num_tokens"] > 0 for event in found)
