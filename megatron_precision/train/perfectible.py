"""`perfectible`: the questions of any data that any checkpoint answers sometimes, as a new set.

    FILE.jsonl             the set, in the layout that `data/prompts.py` reads
    FILE.jsonl.progress    a line a question as soon as it is done; removed at the end

A set takes hours on a GPU, so that a command that was stopped goes on where it was: what is
sampled depends on seed, question and sample alone, and neither on the layout nor on when.

Source: arXiv 2510.26788, section on the sanity test: 40 responses a question at temperature 1,
accuracy from 20 % to 80 % kept.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_precision.checks import inputs
from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.schema import RunConfig, fingerprint
from megatron_precision.data.perfectible import select_perfectible
from megatron_precision.data.prompts import ChatPrompt, parse_set, read_prompts, without_repeats
from megatron_precision.data.tasks import chat_task

# Sampled at a time, in multiples of what the engine runs at once: few enough to lose little,
# many enough that the long responses at the end of one lot are a small part of it.
_FILLS = 4


@dataclass(frozen=True)
class Counts:
    """The counts of one question.

    Attributes:
        right, samples: responses.
        tokens: of all of them.
        truncated: responses that reached the length limit.
    """

    right: int
    samples: int
    tokens: int
    truncated: int

    @property
    def accuracy(self) -> float:
        """The share of right responses."""
        return self.right / self.samples


def progress_file(out: Path) -> Path:
    """Return the file of the counts, kept until the set is complete."""
    return out.with_name(out.name + ".progress")


def require(config: RunConfig, out: Path | None) -> None:
    """Make sure that the command can run.

    Raises:
        UserError: lists everything that stands in its way.
    """
    found = []
    if config.start.kind == "warm_start":
        found.append(
            Problem(
                "a recipe that makes its own perfectible set", "RECIPE", config.recipe,
                "one that starts from a checkpoint", "--model DIR names one",
            )
        )  # fmt: skip
    if out is None:
        found.append(Problem("no file for the set", "--out", "nothing", "a new .jsonl file"))
    elif out.suffix != ".jsonl":
        found.append(Problem("a set of unknown kind", "--out", str(out), "a .jsonl file"))
    elif out.exists():
        found.append(Problem("the set is there already", "--out", str(out), "a new file"))
    found += inputs.input_problems(config)
    if not found and out is not None:
        found += _progress_problems(config, out)
    if found:
        raise UserError(found)


def run(config: RunConfig, out: Path) -> None:
    """Sample and grade every question that has not been, and write the set; on every rank.

    Raises:
        UserError: where no question lies between the bounds.
    """
    import torch.distributed as dist

    from megatron_precision.actor.parallel import open_world
    from megatron_precision.platform import startup
    from megatron_precision.rollout.sampling import Sampler
    from megatron_precision.rollout.vllm_engine import VllmEngine
    from megatron_precision.train.rollouts import GroupSampler

    open_world(startup.backend())
    task = chat_task(config)
    engine = VllmEngine(config, Path(config.start.checkpoint), task.stop_ids)
    sampler = GroupSampler(task, Sampler(engine, config), config.rollout.max_response_tokens)
    questions = {p.id: p for part in task.train.values() for p in part.prompts}
    counts = _read(config, out)
    dist.barrier()  # nobody writes before everybody has read
    waiting = [question for name, question in questions.items() if name not in counts]
    samples = config.perfectible.samples_per_question
    lot = max(1, _FILLS * config.rollout.max_num_seqs // samples)
    first = dist.get_rank() == 0
    if first and not counts:
        _append(out, [{"made_from": _made_from(config)}])
    begin, tokens = time.monotonic(), 0
    for number in range(0, len(waiting), lot):
        part = waiting[number : number + lot]
        sampled = sampler.sample(
            part,
            rollouts_per_prompt=samples,
            purpose="perfectible",
            iteration=0,
            temperature=config.rollout.temperature,
            logprobs=False,
            truncated=config.task.truncated,
        )
        found = dict(zip((p.id for p in part), _counted(sampled, samples), strict=True))
        counts |= found
        tokens += sum(count.tokens for count in found.values())
        if first:
            _append(out, [{"id": n} | dataclasses.asdict(c) for n, c in found.items()])
            done_s = time.monotonic() - begin
            left_s = done_s / (number + len(part)) * (len(waiting) - number - len(part))
            print(
                f"{len(counts)} of {len(questions)} questions, {len(_kept(config, counts))} kept, "
                f"{tokens / done_s:.0f} tokens/s, {left_s / 60:.0f} min to go",
                flush=True,
            )
    sampler.close()
    kept = _kept(config, counts)
    if first and kept:
        _write(out, config, kept, counts)
        print(f"{len(kept)} of {len(questions)} questions kept: {out}", flush=True)
    dist.barrier()
    if not kept:
        low, high = config.perfectible.accuracy_low, config.perfectible.accuracy_high
        raise UserError(
            Problem(
                "no question is answered sometimes", str(progress_file(out)),
                f"{len(questions)} questions, none with {low:.0%} to {high:.0%} right",
                "at least one", "look at the accuracies there; other questions, or other bounds",
            )
        )  # fmt: skip


def _kept(config: RunConfig, counts: Mapping[str, Counts]) -> list[str]:
    settings = config.perfectible
    accuracies = [count.accuracy for count in counts.values()]
    chosen = select_perfectible(accuracies, settings.accuracy_low, settings.accuracy_high)
    names = list(counts)
    return [names[i] for i in chosen]


def _counted(sampled: object, samples: int) -> Iterator[Counts]:
    from megatron_precision.train.rollouts import RolloutGroups

    assert isinstance(sampled, RolloutGroups)
    for row, rewards in enumerate(sampled.rewards):
        rollouts = sampled.rollouts[row * samples : (row + 1) * samples]
        yield Counts(
            right=int((rewards > 0).sum()),
            samples=samples,
            tokens=sum(len(rollout.tokens) for rollout in rollouts),
            truncated=sum(rollout.truncated for rollout in rollouts),
        )


# ---- files -------------------------------------------------------------------------------


def _made_from(config: RunConfig) -> str:
    """Hash what the counts depend on, without the layout and the bounds."""
    return fingerprint(
        {
            "model": dataclasses.asdict(config.model),
            "checkpoint": config.start.checkpoint,
            "task": [config.task.train_sets, config.task.scorer, config.task.max_prompt_tokens],
            "truncated": config.task.truncated,
            "sampling": [config.rollout.temperature, config.rollout.max_response_tokens],
            "samples": config.perfectible.samples_per_question,
            "dtype": config.policy.rollout_params,
            "seed": config.seed,
        }
    )


def _progress_problems(config: RunConfig, out: Path) -> list[Problem]:
    path = progress_file(out)
    try:
        _read(config, out)
    except ValueError as wrong:
        expected = "progress of the same checkpoint, sets and sampling"
        return [Problem("progress of something else", str(path), str(wrong), expected, "remove it")]
    return []


def _read(config: RunConfig, out: Path) -> dict[str, Counts]:
    """Read the counts so far, without a last line that is cut.

    Raises:
        ValueError: where they are of other settings, or unreadable.
    """
    path = progress_file(out)
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8")
    lines = text[: text.rfind("\n") + 1].splitlines()
    if not lines:
        return {}
    header, *rows = map(json.loads, lines)
    if header != {"made_from": _made_from(config)}:
        raise ValueError(f"made from {header.get('made_from')}, not {_made_from(config)}")
    return {row.pop("id"): Counts(**row) for row in rows}


def _append(out: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path = progress_file(out)
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not text.endswith("\n") and text:  # the line that a killed command was writing
        path.write_text(text[: text.rfind("\n") + 1], encoding="utf-8")
    with path.open("a", encoding="utf-8") as lines:
        lines.writelines(json.dumps(row) + "\n" for row in rows)


def _write(out: Path, config: RunConfig, kept: Sequence[str], counts: Mapping[str, Counts]) -> None:
    """Write the set completely or not at all, then remove the progress."""
    prompts: dict[str, tuple[str, ChatPrompt]] = {}
    for part in map(parse_set, config.task.train_sets):
        for prompt in without_repeats(read_prompts(part.path)):
            prompts.setdefault(prompt.id, (part.name, prompt))
    partial = out.with_name(out.name + ".partial")
    with partial.open("w", encoding="utf-8") as lines:
        for name in kept:
            source, prompt = prompts[name]
            row = {
                "data_source": prompt.data_source or source,
                "prompt": [dataclasses.asdict(message) for message in prompt.messages],
                "reward_model": {"style": "rule", "ground_truth": prompt.answer},
                "extra_info": {"accuracy": counts[name].accuracy}
                | dataclasses.asdict(counts[name]),
            }
            lines.write(json.dumps(row, ensure_ascii=False) + "\n")
    partial.replace(out)
    progress_file(out).unlink()
