"""A dump: one iteration as files that any tool reads.

    <run>/dumps/000012/
        rollouts.safetensors   the arrays of `Arrays`
        dump.json              the header: facts, configuration, texts of tokens; written last, so
                               that its presence means complete
        weights/               a Hugging Face checkpoint of the weights that sampled the rollouts
                               and scored them before the update, in the trainer's dtype; left out
                               where the model is larger than `train.dump_weights_gib`

No pickle. Shape legend: S sequences, L the longest prompt plus response. This module imports no
torch.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from megatron_precision.config.errors import Problem, UserError

FORMAT = 1
HEADER = "dump.json"
ARRAYS = "rollouts.safetensors"
WEIGHTS = "weights"


@dataclass(frozen=True)
class Arrays:
    """The values of every token and sequence, in the order of the batch.

    Attributes:
        tokens: [S, L] int32, prompt then response, right-padded with zeros.
        response_mask: [S, L] bool.
        lengths: [S] int32, prompt plus response.
        rollout_logprobs: [S, L] FP32, the engine's, zero outside the response.
        old_logprobs: [S, L] FP32, the trainer's before the update, zero where not known.
        old_known: [S] bool, sequences whose `old_logprobs` were computed.
        rewards: [S] FP32, as graded.
        advantages: [S] FP32.
        truncated: [S] bool, the response reached the length limit.
        weight_version: [S] int32, of the weights that sampled it.
        group: [S] int32, number of the prompt in the batch.
        routed_experts: [S, L, layers, k] int16, the engine's choice; None where not recorded.
    """

    tokens: NDArray[np.int32]
    response_mask: NDArray[np.bool_]
    lengths: NDArray[np.int32]
    rollout_logprobs: NDArray[np.float32]
    old_logprobs: NDArray[np.float32]
    old_known: NDArray[np.bool_]
    rewards: NDArray[np.float32]
    advantages: NDArray[np.float32]
    truncated: NDArray[np.bool_]
    weight_version: NDArray[np.int32]
    group: NDArray[np.int32]
    routed_experts: NDArray[np.int16] | None = None

    def __post_init__(self) -> None:
        sequences, longest = self.tokens.shape
        for name, (dtype, shape) in _LAYOUT.items():
            array = getattr(self, name)
            wanted = {"SL": (sequences, longest), "S": (sequences,)}[shape]
            if array.dtype != dtype or array.shape != wanted:
                raise ValueError(
                    f"{name}: {array.dtype} {list(array.shape)} is not {dtype} {list(wanted)}"
                )

    def __len__(self) -> int:
        return len(self.lengths)


_LAYOUT = {
    "tokens": ("int32", "SL"),
    "response_mask": ("bool", "SL"),
    "lengths": ("int32", "S"),
    "rollout_logprobs": ("float32", "SL"),
    "old_logprobs": ("float32", "SL"),
    "old_known": ("bool", "S"),
    "rewards": ("float32", "S"),
    "advantages": ("float32", "S"),
    "truncated": ("bool", "S"),
    "weight_version": ("int32", "S"),
    "group": ("int32", "S"),
}


@dataclass(frozen=True)
class Header:
    """The header of a dump.

    Attributes:
        iteration: 0-based.
        step: optimizer steps attempted when the iteration ended.
        reasons: why it was dumped.
        config: the whole RunConfig, as `config.to_dict` gives it.
        platform, versions: of the run.
        metrics: the iteration's, as far as known then, with non-finite ones as strings.
        grad_norms: of the iteration's steps.
        weights: where the weights lie, relative to the dump, or "".
        texts: of the token ids that occur, by the id in decimal.
        format: of the files.
    """

    iteration: int
    step: int
    reasons: tuple[str, ...]
    config: dict[str, Any]
    platform: dict[str, Any]
    versions: dict[str, str]
    metrics: dict[str, Any]
    grad_norms: tuple[float | str, ...]
    weights: str
    texts: dict[str, str]
    format: int = FORMAT


@dataclass(frozen=True)
class Dump:
    """A dump that was read."""

    folder: Path
    header: Header
    arrays: Arrays

    @property
    def weights(self) -> Path | None:
        """The checkpoint beside the dump; None without one."""
        return self.folder / self.header.weights if self.header.weights else None

    def text(self, token: int) -> str:
        """Return a token's text, or its number."""
        return self.header.texts.get(str(token), f"<{token}>")


def write_arrays(folder: Path, arrays: Arrays) -> None:
    """Write what is known of the tokens; the folder is made."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {name: np.ascontiguousarray(array) for name, array in _present(arrays).items()}
    save_file(found, folder / ARRAYS)


def write_header(folder: Path, header: Header) -> None:
    """Write the header, which makes the dump complete."""
    partial = folder / f"{HEADER}.partial"
    partial.write_text(json.dumps(dataclasses.asdict(header), indent=1), encoding="utf-8")
    partial.replace(folder / HEADER)


def _present(arrays: Arrays) -> dict[str, NDArray[Any]]:
    fields = {part.name: getattr(arrays, part.name) for part in dataclasses.fields(arrays)}
    return {name: array for name, array in fields.items() if array is not None}


def read_dump(folder: Path) -> Dump:
    """Read a dump.

    Raises:
        UserError: where the folder holds none that is whole and of this format.
    """
    path = folder / HEADER
    expected = f"a folder with {HEADER} and {ARRAYS}, such as RUN/dumps/000012"
    try:
        values: Any = json.loads(path.read_text(encoding="utf-8"))
        arrays = load_file(folder / ARRAYS)
    except FileNotFoundError as wrong:
        missing = folder if not folder.exists() else Path(wrong.filename or folder / ARRAYS)
        what = "no such folder" if missing == folder else f"{missing.name} is not there"
        raise UserError(Problem("not a whole dump", str(folder), what, expected)) from wrong
    except (OSError, ValueError, SafetensorError) as wrong:
        got = f"{type(wrong).__name__}: {wrong}"
        raise UserError(Problem("not a whole dump", str(folder), got, expected)) from wrong
    found = values.get("format") if isinstance(values, dict) else None
    if found != FORMAT:
        raise UserError(
            Problem(
                "a dump of another format", f"{path}: format", str(found), str(FORMAT),
                "replay it with the version of megatron_precision that wrote it",
            )
        )  # fmt: skip
    return Dump(folder, _header(values, path), _arrays(arrays, folder / ARRAYS))


def _header(values: Mapping[str, Any], path: Path) -> Header:
    names = {part.name for part in dataclasses.fields(Header)}
    if names != values.keys():
        raise UserError(
            Problem(
                "other fields than a dump has", str(path), ", ".join(sorted(values)),
                ", ".join(sorted(names)),
            )
        )  # fmt: skip
    lists = {name: tuple(values[name]) for name in ("reasons", "grad_norms")}
    return Header(**{**values, **lists})


def _arrays(arrays: Mapping[str, NDArray[Any]], path: Path) -> Arrays:
    names = {*_LAYOUT, "routed_experts"}
    if missing := sorted(_LAYOUT.keys() - arrays.keys()) + sorted(arrays.keys() - names):
        raise UserError(
            Problem(
                "other arrays than a dump has", str(path), ", ".join(sorted(arrays)),
                f"{', '.join(_LAYOUT)}; amiss: {', '.join(missing)}",
            )
        )  # fmt: skip
    try:
        return Arrays(**arrays)
    except ValueError as wrong:
        raise UserError(
            Problem("an array of another shape", str(path), str(wrong), "as written")
        ) from wrong
