"""Mounts: what each side calls a file, and which folders a container needs besides."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_precision.launch.mounts import Mount, covering, on_host, parse


@pytest.mark.parametrize(
    ("text", "mount"),
    [
        ("/a", Mount("/a", "/a")),
        ("/a:/b", Mount("/a", "/b")),
        ("/a:/b:ro", Mount("/a", "/b", "ro")),
        ("/a:ro", Mount("/a", "/a", "ro")),
    ],
)
def test_a_mount_is_read(text: str, mount: Mount) -> None:
    assert parse(text, "--mount") == (mount, [])


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("a", "the host's folder is no absolute path"),
        ("/a:b", "the container's folder is no absolute path"),
        ("/a:/b:/c", "a mount of too many parts"),
        ("/a b:/c", "a mount with a character that container options cannot carry"),
        ("/a:/b,c", "a mount with a character that container options cannot carry"),
    ],
)
def test_what_is_wrong_with_a_mount_is_named(text: str, what: str) -> None:
    mount, problems = parse(text, "--mount")
    assert mount is None
    assert [problem.what for problem in problems] == [what]


def test_the_innermost_mount_says_where_a_file_is_on_the_host() -> None:
    mounts = [Mount("/lustre", "/data"), Mount("/fast/models", "/data/models")]
    assert on_host("/data/set.jsonl", mounts) == "/lustre/set.jsonl"
    assert on_host("/data/models/x", mounts) == "/fast/models/x"
    assert on_host("/database", mounts) == "/database"


def test_folders_under_a_mount_or_each_other_need_none_of_their_own() -> None:
    mounts = [Mount("/lustre", "/data")]
    folders = [Path("/home/me/runs/x"), Path("/home/me"), Path("/data/model"), Path("/data2")]
    assert covering(folders, mounts) == [
        Mount("/lustre", "/data"), Mount("/data2", "/data2"), Mount("/home/me", "/home/me"),
    ]  # fmt: skip
