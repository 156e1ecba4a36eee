"""Which checkpoints stay, and that half a one is never taken for whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_precision.checkpoint import folders
from megatron_precision.config.errors import UserError


def states(*accuracies: float | None) -> dict[Path, dict[str, Any]]:
    """Checkpoints after 1, 2, ... iterations, with their own evaluation or none."""
    return {
        Path(f"{number:06d}"): {
            "iteration": number,
            "evaluation": None if it is None else {"iteration": number, "accuracy": it},
        }
        for number, it in enumerate(accuracies, start=1)
    }


@pytest.mark.parametrize(
    ("accuracies", "keep", "goes"),
    [
        ((None, None, None, None), 2, [1, 2]),
        ((0.1, 0.9, 0.2, 0.3), 2, [1]),  # the second is the best
        ((0.9, 0.1, 0.9, 0.3, 0.3), 1, [1, 2, 4]),  # of equal ones the latest
        ((0.1, 0.2), 2, []),
        ((0.1,), 3, []),
    ],
)
def test_the_last_ones_and_the_best_stay(
    accuracies: tuple[float | None, ...], keep: int, goes: list[int]
) -> None:
    assert [int(p.name) for p in folders.superfluous(states(*accuracies), keep)] == goes


def test_an_evaluation_of_earlier_weights_does_not_rate_a_checkpoint() -> None:
    found = states(0.9, 0.5, 0.1)
    found[Path("000001")]["evaluation"]["iteration"] = 0
    assert [int(path.name) for path in folders.superfluous(found, 1)] == [1]


def write(out: Path, iteration: int, accuracy: float | None = None) -> Path:
    partial = folders.folder_of(out, iteration).with_suffix(folders.PARTIAL)
    (partial / "huggingface").mkdir(parents=True)
    evaluation = None if accuracy is None else {"iteration": iteration, "accuracy": accuracy}
    state = {"iteration": iteration, "evaluation": evaluation}
    (partial / folders.STATE).write_text(json.dumps(state), encoding="utf-8")
    return partial


def test_a_checkpoint_has_its_name_only_when_it_is_complete(tmp_path: Path) -> None:
    partial = write(tmp_path, 3)
    assert folders.finished(tmp_path) == []
    folder = folders.finish(partial, keep=2)
    assert folder == tmp_path / "checkpoints" / "000003"
    assert folders.finished(tmp_path) == [folder]
    assert folders.read_state(folder)["iteration"] == 3
    write(tmp_path, 4)
    folders.remove_partial(tmp_path)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000003"]


def test_older_ones_go_as_new_ones_come(tmp_path: Path) -> None:
    for iteration, accuracy in ((2, 0.5), (4, 0.8), (6, 0.1), (8, 0.2), (10, 0.3)):
        folders.finish(write(tmp_path, iteration, accuracy), keep=2)
    assert [int(path.name) for path in folders.finished(tmp_path)] == [4, 8, 10]


def test_a_damaged_one_is_put_aside_until_a_new_one_takes_its_place(tmp_path: Path) -> None:
    folder = folders.finish(write(tmp_path, 5), keep=2)
    folders.put_aside(folder)
    assert folders.finished(tmp_path) == []
    assert folder.with_suffix(folders.DAMAGED).is_dir()
    folders.finish(write(tmp_path, 5), keep=2)
    assert [path.name for path in folder.parent.iterdir()] == ["000005"]


def test_a_state_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    folder = folders.finish(write(tmp_path, 5), keep=2)
    (folder / folders.STATE).write_text('{"iteration": 5', encoding="utf-8")
    with pytest.raises(UserError, match=r"000005/trainer\.json"):
        folders.read_state(folder)
