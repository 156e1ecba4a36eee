"""TRL's GRPOTrainer at the work of benchmarks/bench_smollm2.py; prints one JSON object.

Runs in an environment of its own that has trl. A step is one iteration: 64 rollouts of 64 tokens,
trained on in four micro-batches (gradient accumulation). Generation is by transformers.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

PROMPTS, ROLLOUTS, TOKENS, MICRO_BATCHES = 16, 4, 64, 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--work", type=Path, required=True, help="made by benchmarks/smollm2_work.py"
    )
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True, help="TRL's working folder")
    parser.add_argument(
        "--precision",
        choices=("bf16", "autocast", "fp32"),
        default="bf16",
        help="autocast: FP32 weights, BF16 products",
    )
    args = parser.parse_args()

    model_dir = args.work / "model"
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = transformers.AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.bfloat16 if args.precision == "bf16" else torch.float32
    )
    lines = (args.work / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    data = Dataset.from_list([{"prompt": json.loads(line)["prompt"]} for line in lines])
    produced: list[int] = []

    def reward(completions, completion_ids, **_: object):  # type: ignore[no-untyped-def]
        produced.append(sum(len(ids) for ids in completion_ids))
        texts = (c[0]["content"].lower() for c in completions)
        return [len({c for c in text if c.isalpha()}) / 26 for text in texts]

    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=data,
        args=GRPOConfig(
            output_dir=str(args.out),
            use_cpu=True,
            bf16=args.precision == "autocast",
            per_device_train_batch_size=PROMPTS * ROLLOUTS // MICRO_BATCHES,
            gradient_accumulation_steps=MICRO_BATCHES,
            num_generations=ROLLOUTS,
            num_iterations=1,
            max_steps=args.iterations,
            max_completion_length=TOKENS,
            learning_rate=1e-6,
            beta=0.0,
            temperature=1.0,
            scale_rewards=False,
            gradient_checkpointing=False,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
    )
    marks: list[float] = []

    class Marks(transformers.TrainerCallback):
        def on_step_end(self, *_args: object, **_kwargs: object) -> None:
            marks.append(time.perf_counter())

    trainer.add_callback(Marks())
    begin = time.perf_counter()
    trainer.train()
    seconds = [b - a for a, b in itertools.pairwise([begin, *marks])]
    print(json.dumps({"tokens": produced, "seconds": seconds, "threads": torch.get_num_threads()}))


if __name__ == "__main__":
    main()
