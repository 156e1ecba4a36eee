"""TRL's GRPOTrainer at the work of one iteration of `sanity.tiny_dense`: a newcomer's choice.

Runs in an environment of its own that has trl (benchmarks/bench_speed.py says how to make it):
512 rollouts of the same model and prompts, four optimizer steps, FP32, generation by
transformers, on all cores. Prints one JSON object; needs a prepared start.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
import transformers
from datasets import Dataset
from trl import GRPOConfig, GRPOTrainer

PROMPTS, ROLLOUTS, STEPS = 64, 8, 4


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--start", type=Path, required=True, help="a prepared start's folder")
    parser.add_argument("--iterations", type=int, default=5)
    parser.add_argument("--out", type=Path, required=True, help="TRL's working folder")
    args = parser.parse_args()

    tokenizer = transformers.AutoTokenizer.from_pretrained(args.start / "model")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.start / "model", dtype=torch.float32
    )
    lines = (args.start / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    questions = [json.loads(line) for line in lines]
    data = Dataset.from_list([{k: q[k] for k in ("prompt", "answer")} for q in questions])
    produced: list[int] = []

    def reward(completions: list[str], answer: list[str], completion_ids, **_: object):  # type: ignore[no-untyped-def]
        produced.append(sum(len(ids) for ids in completion_ids))
        return [
            float(c.replace(" ", "").endswith(f"={a}"))
            for c, a in zip(completions, answer, strict=True)
        ]

    trainer = GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward,
        train_dataset=data,
        args=GRPOConfig(
            output_dir=str(args.out),
            use_cpu=True,
            bf16=False,
            per_device_train_batch_size=PROMPTS * ROLLOUTS // STEPS,
            steps_per_generation=STEPS,
            num_generations=ROLLOUTS,
            num_iterations=1,
            max_steps=args.iterations * STEPS,
            max_completion_length=96,
            learning_rate=1e-4,
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
    edges = [begin, *marks[STEPS - 1 :: STEPS]]
    seconds = [b - a for a, b in itertools.pairwise(edges)]
    rates = [tokens / s for tokens, s in zip(produced, seconds, strict=True)]
    print(
        json.dumps(
            {
                "system": "trl",
                "iteration_s": statistics.median(seconds[1:]),
                "tokens_per_s": statistics.median(rates[1:]),
                "tokens": produced,
                "seconds": seconds,
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
