"""What a Megatron checkpoint carries along of a Hugging Face folder: all but the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_precision.checkpoint import manifest

if TYPE_CHECKING:
    import torch

# The folder of config, tokenizer and chat template inside a `torch_dist` checkpoint.
SIDECAR = "huggingface"
# Other formats' weights, which the new checkpoint's are not; any *.index.json belongs to weights.
_WEIGHTS = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".onnx_data",
     ".ot", ".tflite"}
)  # fmt: skip
# The one folder beside the tokenizer that transformers reads.
_TEMPLATES = "additional_chat_templates"


def copy_sidecar(source: Path, target: Path) -> None:
    """Carry config, generation config, tokenizer and chat templates along, byte for byte."""
    for path in sorted([*source.iterdir(), *source.glob(f"{_TEMPLATES}/*")]):
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        if path.is_file() and not weights and path.name != manifest.FILE:
            copy = target / path.relative_to(source)
            copy.parent.mkdir(exist_ok=True)
            shutil.copyfile(path, copy)


def state_dtype(config: Path, dtypes: Iterable[torch.dtype]) -> None:
    """Make `config.json` say the dtype that the weights have: readers load them in what it says.

    Where it says so already, or the weights have several, the file stays byte for byte.
    """
    kinds = {str(dtype).removeprefix("torch.") for dtype in dtypes}
    values = json.loads(config.read_text(encoding="utf-8"))
    fields = [name for name in ("dtype", "torch_dtype") if name in values] or ["torch_dtype"]
    if len(kinds) == 1 and any(values.get(field) not in kinds for field in fields):
        values |= dict.fromkeys(fields, *kinds)
        config.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
