"""The files of a replay: figures, picture and log-probs."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from megatron_precision.observe.metrics import finite
from megatron_precision.replay.picture import draw
from megatron_precision.replay.report import Replay

FIGURES = "replay.json"
PICTURE = "replay.png"
LOGPROBS = "logprobs.safetensors"


def write(replay: Replay, out: Path) -> None:
    """Write figures, picture and log-probs; the folder is made."""
    out.mkdir(parents=True, exist_ok=True)
    values = {
        part.name: getattr(replay, part.name)
        for part in dataclasses.fields(replay)
        if part.name != "logprobs"
    }
    text = json.dumps(finite(_plain(values)), indent=1, allow_nan=False)
    (out / FIGURES).write_text(text + "\n", encoding="utf-8")
    logprobs = {name: np.ascontiguousarray(array) for name, array in replay.logprobs.items()}
    save_file(logprobs, out / LOGPROBS)
    draw(replay).savefig(out / PICTURE, dpi=150)


def _plain(value: Any) -> Any:
    """Dataclasses as dictionaries, at any depth."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(dataclasses.asdict(value))
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    assert value is None or isinstance(value, str | int | float), type(value)
    return value if not isinstance(value, float) or math.isfinite(value) else finite(value)
