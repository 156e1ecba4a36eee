"""Checks the algorithm and the scorer that a user wrote in a file, before an engine loads.

An algorithm is tried on a batch of two responses, a scorer on an empty response to one prompt. So
a function of the wrong type ends in a message that names its line, and not in a run that fails
after the engines have started.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from megatron_precision.config import user_files
from megatron_precision.config.errors import Problem, UserError
from megatron_precision.config.schema import RunConfig
from megatron_precision.rewards.grading import PooledGrader, Response
from megatron_precision.rewards.scorers import SIGNATURE, FileScorer, scorer
from megatron_precision.rl.algorithms import ALGORITHMS, Algorithm, algorithm


def algorithm_or_none(config: RunConfig) -> Algorithm | None:
    """Return the configuration's algorithm; `algorithm_problems` says why there is none."""
    try:
        return algorithm(config.algo.name)
    except UserError:
        return None


def algorithm_problems(config: RunConfig) -> list[Problem]:
    """List what is wrong with `algo.name`: an unknown name, or a file that cannot be used."""
    name = config.algo.name
    try:
        row = algorithm(name)
    except UserError as wrong:
        return list(wrong.problems)
    if name in ALGORITHMS:
        return []
    try:
        return _try_parts(row, config)
    except UserError as wrong:
        return list(wrong.problems)


def scorer_problems(config: RunConfig) -> list[Problem]:
    """List what is wrong with `task.scorer`: a module or a file that cannot be loaded."""
    try:
        scorer(config.task.scorer)
    except UserError as wrong:
        return list(wrong.problems)
    return []


def try_scorer(config: RunConfig, answer: str) -> list[Problem]:
    """Score an empty response with a user's file, in a worker process.

    Args:
        config: names a scorer in a file that can be loaded.
        answer: the right answer of one of the run's prompts.
    """
    reference = config.task.scorer
    found = scorer(reference)
    assert isinstance(found, FileScorer)
    grader = PooledGrader(found, workers=1, time_limit_s=config.task.scorer_time_limit_s)
    try:
        grade = grader.submit(Response("a trial", "", answer, truncated=False)).result()
    finally:
        grader.close()
    if grade.status == "scored":
        return []
    path, _ = user_files.split(reference)
    lines = [line.strip() for line in grade.report.rstrip().splitlines()]
    inside = [line for line in lines if line.startswith(f'File "{path}", line ')]
    place = user_files.place(found.function, reference, "task.scorer")
    return [
        Problem(
            "the scorer fails on an empty response",
            f"task.scorer, {path}, {inside[-1].split(', ')[1]}" if inside else place,
            f"{grade.status.replace('_', ' ')}: {lines[-1]}",
            f"{SIGNATURE}, which returns a finite number",
            f"correct the function; it was called with '' and {answer[:80]!r}",
        )
    ]


def _try_parts(row: Algorithm, config: RunConfig) -> list[Problem]:
    """Call every function of a row on two responses of three and two tokens.

    Raises:
        UserError: a function raises.
    """
    # The user's file has imported torch; the built-in names do without.
    import torch

    from megatron_precision.rl.correction import CorrectionTerms, PolicyInputs
    from megatron_precision.rl.losses import PolicyTerms

    mask = torch.tensor([[True, True, True], [True, True, False]])
    logprobs = torch.tensor([[-0.5, -1.0, -2.0], [-0.1, -3.0, 0.0]], requires_grad=True)
    inputs = PolicyInputs(
        logprobs,
        (logprobs.detach() - 0.1) * mask if row.needs_old_logprobs else None,
        (logprobs.detach() + 0.1) * mask,
        torch.tensor([[1.0], [-1.0]]),
        mask,
    )
    rewards = torch.tensor([[1.0, 0.0], [0.5, 0.0]])
    tokens = torch.tensor([[3, 2], [1, 4]])
    limit = config.rollout.max_response_tokens
    like_mask = (mask.shape, torch.float32)
    per_rollout = {"the result": (rewards.shape, torch.float32)}
    trials: tuple[tuple[Any, tuple[Any, ...], type, dict[str, Any]], ...] = (
        (row.policy_loss, (inputs, config.algo), PolicyTerms, {
            "loss": like_mask, "clipped": (mask.shape, torch.bool), "ratio": like_mask,
            "gradient_factor": like_mask,
        }),
        (row.correction, (inputs, config.algo), CorrectionTerms, {
            "weight": like_mask, "cut": (mask.shape, torch.bool),
        }),
        (row.advantage, (rewards,), torch.Tensor, per_rollout),
        (row.reward_shaping, (rewards, tokens, limit, config.algo), torch.Tensor, per_rollout),
    )  # fmt: skip
    found: list[Problem] = []
    for function, arguments, kind, tensors in trials:
        if not callable(function):
            continue
        result = user_files.call(function, config.algo.name, "algo.name", *arguments)
        problems = _result_problems(function, result, kind, tensors, config.algo.name)
        if not problems and kind is PolicyTerms and not _has_gradient(result.loss, logprobs):
            problems = [
                _wrong(function, config.algo.name, "no gradient", "a loss of train_logprobs")
            ]
        found += problems
    return found


def _result_problems(
    function: Callable[..., Any],
    result: Any,
    kind: type,
    tensors: dict[str, Any],
    reference: str,
) -> list[Problem]:
    """List the tensors of a result that have another shape or dtype than they must."""
    if not isinstance(result, kind):
        return [_wrong(function, reference, repr(type(result).__name__), kind.__name__)]
    found = []
    for name, (shape, dtype) in tensors.items():
        tensor = result if name == "the result" else getattr(result, name)
        got = (getattr(tensor, "shape", None), getattr(tensor, "dtype", None))
        if got != (shape, dtype):
            shown = type(tensor).__name__ if got[0] is None else f"{list(got[0])} of {got[1]}"
            found.append(
                _wrong(function, reference, f"{name}: {shown}", f"{list(shape)} of {dtype}")
            )
    return found


def _has_gradient(loss: Any, logprobs: Any) -> bool:
    """Say whether a loss reaches the log-probs, with finite gradients."""
    import torch

    if not loss.requires_grad:
        return False
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs, allow_unused=True)
    return gradient is not None and bool(torch.isfinite(gradient).all() and gradient.any())


def _wrong(function: Callable[..., Any], reference: str, got: str, expected: str) -> Problem:
    name = getattr(function, "__name__", "the function")
    where = user_files.place(function, reference, "algo.name")
    return Problem(f"{name} returns the wrong type", where, got, expected, "correct the function")
