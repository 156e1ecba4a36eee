"""Finds the start that the RL runs of a recipe share, and says whether it is complete.

A checkpoint is the user's own folder. A warm start is made once and cached:

    <start>/model/            a Hugging Face checkpoint (FP32 tensors, values on the BF16 grid)
    <start>/questions.jsonl   the perfectible set
    <start>/start.json        facts about it; written last, so its presence means complete

The values are on the BF16 grid so that every policy starts from the same function: BF16 and FP16
represent them exactly (FP16 above 2^-24; smaller ones are counted).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from megatron_precision.config.schema import RunConfig, fingerprint
from megatron_precision.data.perfectible import read_perfectible
from megatron_precision.data.tasks import Task, arithmetic_task, chat_task

CACHE = Path("runs") / "cache"
FACTS = "start.json"
MODEL = "model"
QUESTIONS = "questions.jsonl"
# What of the task a warm start depends on.
_TASK_FIELDS = ("name", "max_prompt_tokens", "difficulty", "train_questions", "eval_questions")


def start_fingerprint(config: RunConfig) -> str:
    """Hash all that a start depends on; precision, algorithm and RL settings do not count."""
    task = {name: getattr(config.task, name) for name in _TASK_FIELDS}
    parts = (config.model, config.warm_start, config.perfectible)
    return fingerprint(
        {
            "task": task,
            "parts": [dataclasses.asdict(part) for part in parts],
            "seed": config.seed,
            "max_response_tokens": config.rollout.max_response_tokens,
            "layout": 1,
        }
    )


def start_dir(config: RunConfig) -> Path:
    """Return the folder in which the start of this config is, or will be."""
    return CACHE / start_fingerprint(config)


def start_is_complete(path: Path) -> bool:
    """Say whether a folder has a complete start."""
    return (path / FACTS).is_file()


def read_facts(path: Path) -> dict[str, Any]:
    """Read the facts about a complete start."""
    facts: dict[str, Any] = json.loads((path / FACTS).read_text(encoding="utf-8"))
    return facts


def open_start(config: RunConfig, chosen: Path | None = None) -> tuple[Path, Task]:
    """Return the folder of the first weights, and the task of the run.

    Args:
        chosen: a prepared warm start, by default the cache's.

    Raises:
        UserError: for a checkpoint or files of prompts that cannot be used.
    """
    if config.start.kind == "checkpoint":
        return Path(config.start.checkpoint), chat_task(config)
    folder = chosen or start_dir(config)
    questions = [item.question for item in read_perfectible(folder / QUESTIONS)]
    return folder / MODEL, arithmetic_task(config.task, questions, config.seed)
