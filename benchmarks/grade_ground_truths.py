"""Whether the math scorer takes every right answer of a set for right, and another for wrong.

.venv/bin/python benchmarks/grade_ground_truths.py SET.parquet ... --out grading.json

Each different right answer is boxed at the end of a response and graded against itself, and so
are its two neighbours in the sorted list of the set's answers, which look most like it.
Neighbours that are one number, but for a unit, a base or a last zero, are neither right nor wrong
and left out. Whatever is graded the other way is printed. The result file holds counts alone,
none of the set's content.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import shlex
import sys
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from megatron_precision.data.prompts import read_prompts, without_repeats
from megatron_precision.rewards import math
from megatron_precision.rewards.isolation import Sample, ScorerPool, Verdict

_DRESS = re.compile(r"_\{?\d+\}?$|(?<=\d)\s*\\text\{.*?\}|\^\{?\\circ\}?|\\%|\.0+$|\s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sets", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    with ScorerPool(math.score, workers=args.workers) as pool:
        counts = {path.name: grade(path, pool) for path in args.sets}
    # The sets' names, without the folder that they happen to lie in.
    words = [path.name for path in args.sets] + ["--out", str(args.out)]
    command = shlex.join(["benchmarks/grade_ground_truths.py", *words])
    result = {"command": command, "workers": args.workers, "sets": counts}
    args.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def grade(path: Path, pool: ScorerPool) -> dict[str, float]:
    """Counts of one set, printed too, with every answer that was graded the other way."""
    rows = read_prompts(path)
    questions = without_repeats(rows)
    answers = sorted({question.answer for question in questions})
    rights = [sample(answer, answer) for answer in answers]
    neighbours = list(itertools.pairwise(answers))
    pairs = [(a, b) for a, b in neighbours if _DRESS.sub("", a) != _DRESS.sub("", b)]
    wrongs = [sample(a, b) for a, b in pairs] + [sample(b, a) for a, b in pairs]
    begin = time.perf_counter()
    right, wrong = pool.score(rights), pool.score(wrongs)
    spent = time.perf_counter() - begin
    refused = [v for v in right if v.reward != 1.0]
    taken = [v for v in wrong if v.reward != 0.0]
    failed = [v for v in [*right, *wrong] if v.status != "scored"]
    show("right answers that were refused", refused)
    show("neighbours that were taken for right", taken)
    show("samples that could not be graded", failed)
    in_questions = Counter(question.answer for question in questions)
    counts = {
        "rows": len(rows),
        "questions": len(questions),
        "questions_right": len(questions) - sum(in_questions[v.sample.answer] for v in refused),
        "answers": len(answers),
        "answers_right": len(right) - len(refused),
        "neighbours_left_out": 2 * (len(neighbours) - len(pairs)),
        "neighbours": len(wrong),
        "neighbours_wrong": len(wrong) - len(taken),
        "failed": len(failed),
        "largest_s": round(max(v.scoring_s for v in [*right, *wrong]), 3),
        "samples_per_s": round((len(right) + len(wrong)) / spent, 1),
    }
    print(path.name, json.dumps(counts), flush=True)
    return counts


def sample(answer: str, given: str) -> Sample:
    """A response that works with other numbers on its way, and gives `given` as its answer."""
    response = f"With $x = 7$ we get $\\frac{{x}}{{2}}$. The answer is $\\boxed{{{given}}}$."
    return Sample(f"{given!r} for {answer!r}", response, answer)


def show(what: str, verdicts: list[Verdict]) -> None:
    """Print the samples of a kind, for a reader to judge."""
    if verdicts:
        print(f"{len(verdicts)} {what}:")
        for verdict in verdicts:
            print(f"  {verdict.status}: {verdict.sample.name} {verdict.detail[-200:]}")


if __name__ == "__main__":
    main()
