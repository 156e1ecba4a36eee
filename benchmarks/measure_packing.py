"""Padding and imbalance of four ways to divide sequences, on lengths that a real run sampled.

    .venv/bin/python benchmarks/measure_packing.py runs/mismatch/sample-*.npz --config CONFIG \
        --out docs/benchmarks/raw/packing.json

The archives are those of `make mismatch`: each is one mini-batch. CONFIG is the model's
config.json, for what attention costs beside products with weights. Divided are whole sequences:
    as they come   consecutive ones to a rank, micro-batches of so many, as wide as their longest
    by count       sorted by length, dealt over the ranks, micro-batches of so many
    by tokens      under the budget of padded tokens that the widest micro-batch by count has
    packed         the same, end to end in one row (train.packed_sequences)
Nothing is timed: shares are counted tokens, imbalance is max / mean - 1 of the ranks' counted work.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_precision.actor.packing import (
    Packing,
    Plan,
    attention_tokens,
    dp_imbalance,
    padding_share,
    plan_micro_batches,
)
from megatron_precision.layouts.hf_config import read_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("samples", type=Path, nargs="+")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--dp", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    attention = attention_tokens(read_model(args.config))
    rows = []
    for path in args.samples:
        with np.load(path) as archive:
            lengths = torch.from_numpy(archive["prompt_lengths"] + archive["lengths"])
        for dp_size in args.dp:
            rows.append(
                {"samples": path.name, "dp_size": dp_size, "lengths": lengths.tolist()}
                | measure(lengths, dp_size, args.micro_batch_size, attention)
            )
            print({key: value for key, value in rows[-1].items() if key != "lengths"})
    # Names without the folder that the files happen to lie in.
    words = [path.name for path in args.samples] + ["--config", args.config.name]
    words += ["--micro-batch-size", str(args.micro_batch_size), "--dp", *map(str, args.dp)]
    command = shlex.join(["benchmarks/measure_packing.py", *words])
    args.out.write_text(json.dumps({"command": command, "rows": rows}) + "\n", encoding="utf-8")


def measure(
    lengths: torch.Tensor, dp_size: int, micro_batch_size: int, attention: float
) -> dict[str, object]:
    """Padding share, imbalance and micro-batches of a rank, for the four ways."""
    everyone = torch.arange(len(lengths))
    by_count = Packing(dp_size, micro_batch_size, attention_tokens=attention)
    counted = plan_micro_batches(lengths, everyone, by_count)
    budget = max(micro.tokens for plan in counted for micro in plan)
    by_tokens = Packing(dp_size, micro_batch_size, budget, attention_tokens=attention)
    packed = dataclasses.replace(by_tokens, packed=True)
    as_they_come = [
        [by_count.micro_batch(chunk, lengths) for chunk in share.split(micro_batch_size)]
        for share in everyone.chunk(dp_size)
    ]
    ways: dict[str, tuple[Packing, list[Plan]]] = {
        "as they come": (by_tokens, as_they_come),
        "by count": (by_tokens, counted),
        "by tokens": (by_tokens, plan_micro_batches(lengths, everyone, by_tokens)),
        "packed": (packed, plan_micro_batches(lengths, everyone, packed)),
    }
    return {"budget": budget} | {
        name: {
            "padding_share": round(padding_share(lengths, plans), 4),
            "dp_imbalance": round(dp_imbalance(lengths, plans, packing), 4),
            "micro_batches": len(plans[0]),
        }
        for name, (packing, plans) in ways.items()
    }


if __name__ == "__main__":
    main()
