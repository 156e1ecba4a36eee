"""Where a layout cuts a Megatron checkpoint: into files, and tensors into parts.

Any layout loads from any cut; the ranks of the one it was cut for read nothing but their own.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_precision.config import ModelConfig, ParallelConfig
from megatron_precision.errors import Problem, UserError
from megatron_precision.weights.megatron_checkpoint import Slot, slots
from tools.checkpoint_convert.arguments import below_one
from tools.checkpoint_convert.source import Source


def shards(
    slot: Slot, row: int, rows: torch.Tensor, size: int
) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """(start, box) of every part of `rows`, which begin at `row` of the slot.

    Args:
        size: tensor-parallel ranks that divide the slot.
    """
    linear = slot.key.rpartition(".")[0].rpartition(".")[2]
    if linear in ("linear_proj", "linear_fc2") and rows.ndim == 2:
        width = rows.shape[1] // size
        for column in range(0, rows.shape[1], width):
            yield (row, column), rows[:, column : column + width]
        return
    # [gate | up] of a rank are two runs of rows.
    cuts = {"linear_fc1": 2 * size, "linear_qkv": size}.get(linear, 1)
    if slot.key.endswith("layer_norm_weight"):
        cuts = 1
    height, begin = slot.shape[0] // cuts, 0
    while begin < rows.shape[0]:
        end = min(begin + height - (row + begin) % height, rows.shape[0])
        yield (row + begin, *(0 for _ in rows.shape[1:])), rows[begin:end]
        begin = end


def refuse_layout(model: ModelConfig, layout: ParallelConfig) -> None:
    """Raise a UserError that lists every size below 1, and all that the layout does not divide."""
    ranks = {name: getattr(layout, f"{name}_size") for name in ("tp", "pp", "ep", "etp")}
    problems = below_one(ranks)
    sizes = [
        ("tp", layout.tp_size, "KV heads", model.num_key_value_heads),
        ("pp", layout.pp_size, "layers", model.num_hidden_layers),
    ]
    if model.num_experts:
        sizes += [
            ("ep", layout.ep_size, "experts", model.num_experts),
            ("etp", layout.etp_size, "the experts' MLP", model.moe_intermediate_size),
        ]
    else:
        sizes.append(("tp", layout.tp_size, "the MLP", model.intermediate_size))
    problems += [
        Problem(
            f"--{option} does not divide {what}",
            f"--{option}",
            f"{count} / {size}",
            f"a divisor of {count}",
        )
        for option, size, what, count in sizes
        if size >= 1 and count % size
    ]
    if not model.num_experts and layout.ep_size * layout.etp_size != 1:
        problems.append(Problem("a dense model has no experts", "--ep, --etp", "more than 1", "1"))
    if problems:
        raise UserError(problems)


def file_spans(source: Source, layout: ParallelConfig, workers: int) -> list[tuple[int, int]]:
    """`[first, last)` slots of each file: cut at pipeline stages and expert ranks, then evenly."""
    found = slots(source.model)
    stage = source.model.num_hidden_layers // layout.pp_size
    experts = max(1, source.model.num_experts // layout.ep_size)
    sizes = [sum(source.tensors[p.hf_name].bytes for p in slot.pieces) for slot in found]
    limit = sum(sizes) // workers + 1
    spans, first, filled = [], 0, 0
    group: tuple[int, int] | None = None
    for number, slot in enumerate(found):
        at = (slot.index[0] // stage if slot.index else -1,
              slot.index[1] // experts if len(slot.index) == 2 else -1)  # fmt: skip
        moved = layout.pp_size > 1 and at[0] >= 0 and group is not None and at[0] != group[0]
        moved |= layout.ep_size > 1 and group is not None and at[1] != group[1]
        if number > first and (moved or filled + sizes[number] > limit):
            spans.append((first, number))
            first, filled = number, 0
        group, filled = at, filled + sizes[number]
    return [*spans, (first, len(found))]
