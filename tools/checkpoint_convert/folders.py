"""What a folder is, by its name and the files in it: asked before torch is loaded."""

from __future__ import annotations

from pathlib import Path

from megatron_precision.errors import Problem

# In the name of the folder of a conversion that is under way, or was killed.
PARTIAL = ".partial"
# The file that a `torch_dist` folder has and no other.
METADATA = ".metadata"


def is_megatron(path: Path) -> bool:
    """Whether it is a `torch_dist` folder; what is none is a Hugging Face folder, or nothing."""
    return (path / METADATA).is_file()


def not_a_folder(path: Path) -> list[Problem]:
    """The problem of a path that is no folder to read from, if it is none."""
    if path.is_dir():
        return []
    if path.exists():
        return [
            Problem(
                "a file, where a folder is wanted", str(path), "a file", "a folder",
                f"give the folder that holds it: {path.parent}",
            )
        ]  # fmt: skip
    return [Problem("no such folder", str(path), "nothing of that name", "a folder")]


def source_problems(path: Path) -> list[Problem]:
    """What keeps a path from being opened as a checkpoint of either format."""
    if path.resolve().name.endswith(PARTIAL):
        return [
            Problem(
                "an unfinished conversion", str(path), f"a folder named *{PARTIAL}",
                "a finished one", "convert again",
            )
        ]  # fmt: skip
    if not path.is_dir() or is_megatron(path) or (path / "config.json").is_file():
        return not_a_folder(path)
    return [
        Problem(
            "not a checkpoint",
            str(path),
            f"a folder without config.json and {METADATA}",
            "a Hugging Face folder, or a Megatron torch_dist folder",
        )
    ]


def target_problems(source: Path | None, target: Path) -> list[Problem]:
    """What keeps `target` from being made, a new folder outside `source`."""
    target = target.resolve()
    if target.exists() or target.name.endswith(PARTIAL):
        got = f"a name that ends in {PARTIAL}"
        if target.exists():
            got = "a folder that exists" if target.is_dir() else "a file that exists"
        return [
            Problem("not a new folder", str(target), got, "a new folder", "choose another name")
        ]
    if source is not None and target.is_relative_to(source.resolve()):
        return [
            Problem(
                "the output is inside the input", str(target), f"a folder in {source}",
                "a new folder outside it",
            )
        ]  # fmt: skip
    above = next(path for path in target.parents if path.exists())
    if not above.is_dir():
        return [Problem("the output is below a file", str(target), f"{above}, a file", "a folder")]
    return []


def one_format_problem(first: Path, second: Path) -> list[Problem]:
    """The problem of two folders of one format, for what compares the two."""
    if is_megatron(first) != is_megatron(second):
        return []
    return [
        Problem(
            "--logits compares the two formats", f"{first}, {second}", "one format twice",
            "a Hugging Face folder and a Megatron folder",
        )
    ]  # fmt: skip
