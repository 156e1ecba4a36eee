"""Routing of a trained MoE model: engine against trainer, by dtype, with and without replay (R3).

    torchrun --standalone --nproc-per-node 2 -m megatron_precision prepare sanity.tiny_moe
    .venv/bin/python benchmarks/measure_routing.py START --out docs/benchmarks/raw/routing.json

START is what the first command prints, a folder in runs/cache. Makes a checkpoint with a chat
template of its model, and a file of prompts of its questions, and gives both to
`python -m megatron_precision mismatch`, whose figures are the result. Nothing is trained.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

# A question is its own prompt, as in the recipe.
TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("start", type=Path, help="a prepared start: model/ and questions.jsonl")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/routing"))
    parser.add_argument("--dtypes", default="bf16,fp16,fp32")
    parser.add_argument("--num-prompts", type=int, default=128)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    model, prompts = args.work / "model", args.work / "questions.jsonl"
    shutil.copytree(args.start / "model", model, dirs_exist_ok=True)
    (model / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    lines = (args.start / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    with prompts.open("w", encoding="utf-8") as file:
        for question in map(json.loads, lines):
            row = {
                "data_source": "arithmetic",
                "prompt": [{"role": "user", "content": question["prompt"]}],
                "reward_model": {"ground_truth": question["answer"]},
            }
            file.write(json.dumps(row) + "\n")
    words = [sys.executable, "-m", "megatron_precision", "mismatch", "--model", str(model)]
    words += ["--prompts", str(prompts), "--out", str(args.work / "mismatch")]
    words += ["--train", args.dtypes, "--rollout", args.dtypes, "--max-tokens", "96"]
    words += ["--num-prompts", str(args.num_prompts), "--rollouts", "4"]
    words += ["--set", "task.max_prompt_tokens=32"]
    subprocess.run(words, check=True)
    found = json.loads((args.work / "mismatch" / "report.json").read_text(encoding="utf-8"))
    # The folders are those of whoever runs it.
    line = ["benchmarks/measure_routing.py", "START", "--dtypes", args.dtypes]
    found = {"command": shlex.join([*line, "--num-prompts", str(args.num_prompts)])} | found
    args.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
