"""One layer's regions, drawn from the plan: docs/images/sync_regions.png.

.venv/bin/python benchmarks/draw_regions.py --out docs/images/sync_regions.png
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from benchmarks.sync.parameters import RankParameter, engine_parameters, trainer_parameters
from megatron_precision.cli.sync_bench import model_of, planner_of
from megatron_precision.layouts.regions import Region
from megatron_precision.sync.plan import Cell, Planner

HUES = {
    "q_proj": "Blues", "k_proj": "Greens", "v_proj": "Oranges",
    "gate_proj": "Purples", "up_proj": "Reds",
}  # fmt: skip
TRAINER = ("self_attention.linear_qkv.weight", "mlp.linear_fc1.weight")
ENGINE = ("self_attn.qkv_proj.weight", "mlp.gate_up_proj.weight")
TITLES = ("linear_qkv → qkv_proj", "linear_fc1 → gate_up_proj")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model = dataclasses.replace(model_of("qwen3-14b"), num_hidden_layers=1)
    planner = planner_of(model, "tp=4", "tp=2,dp=2", 4, 8, False, cell_elements=2**40)
    figure, axes = plt.subplots(1, 2, figsize=(12, 6.2), layout="constrained")
    for ax, trainer, engine, title in zip(axes, TRAINER, ENGINE, TITLES, strict=True):
        draw(ax, planner, trainer, engine)
        ax.set_title(title)
    figure.legend(
        handles=[Patch(color=plt.get_cmap(hue)(0.6), label=name) for name, hue in HUES.items()],
        loc="outside lower center",
        ncols=len(HUES),
        frameon=False,
    )
    figure.savefig(args.out, dpi=110)


def draw(ax: Axes, planner: Planner, trainer: str, engine: str) -> None:
    """Parameters of four trainers on the left, of one engine's two ranks on the right."""
    model = planner.model
    sources = [
        _one(trainer_parameters(model, planner.trainer, rank), trainer)
        for rank in planner.trainer.world
    ]
    targets = [_one(engine_parameters(model, planner.rollout, rank), engine) for rank in (0, 1)]
    height = sum(parameter.shape[0] for parameter in targets)
    gap = height * 0.03
    top = 0.0
    for rank, parameter in enumerate(sources):
        for region in parameter.regions:
            for begin, end in _runs(region):
                _bar(ax, 0.0, top + begin, end - begin, _colour(region.hf_name, rank))
        ax.text(
            -0.06, top + parameter.shape[0] / 2, f"trainer\nrank {rank}", ha="right", va="center"
        )
        top += parameter.shape[0] + gap
    top = gap
    for rank, parameter in enumerate(targets):
        plan = planner.rank_plan(rank)
        owners = dict.fromkeys(plan.copies, rank)
        for peer, cells in plan.direct.receives.items():
            owners |= dict.fromkeys(cells, peer)
        for region in parameter.regions:
            for cell, owner in owners.items():
                if cell.hf_name == region.hf_name and region.holds(cell.start, cell.shape):
                    _cell(ax, top, region, cell, owner, copied=owner == rank)
        middle = top + parameter.shape[0] / 2
        ax.text(2.06, middle, f"engine\nrank {rank}", ha="left", va="center")
        top += parameter.shape[0] + gap
    ax.set_xlim(-0.5, 2.5)
    ax.set_ylim(height + 4 * gap, -gap)
    ax.axis("off")


def _cell(ax: Axes, top: float, region: Region, cell: Cell, owner: int, *, copied: bool) -> None:
    begin = region.index[0][0] + cell.start[0] - region.start[0]
    _bar(ax, 1.4, top + begin, cell.shape[0], _colour(cell.hf_name, owner))
    if cell.shape[0] > 200:
        text = f"copy of {owner}" if copied else f"from {owner}"
        ax.text(1.7, top + begin + cell.shape[0] / 2, text, ha="center", va="center", fontsize=7)


def _runs(region: Region) -> list[tuple[int, int]]:
    """The rows of a Megatron parameter that a region takes, run by run."""
    if len(region.view) == 2:
        return [region.index[0]]
    (_, groups), (first, last), _, _ = region.index
    rows, per_group = region.view[2], region.view[1] * region.view[2]
    return [(g * per_group + first * rows, g * per_group + last * rows) for g in range(groups)]


def _bar(ax: Axes, x: float, y: float, rows: float, colour: object) -> None:
    ax.add_patch(Rectangle((x, y), 0.6, rows, facecolor=colour, edgecolor="white", linewidth=0.6))


def _colour(hf_name: str, rank: int) -> object:
    hue = next(hue for name, hue in HUES.items() if name in hf_name)
    return plt.get_cmap(hue)(0.3 + 0.17 * rank)


def _one(parameters: object, name: str) -> RankParameter:
    return next(parameter for parameter in parameters if parameter.name.endswith(name))  # type: ignore[attr-defined]


if __name__ == "__main__":
    main()
