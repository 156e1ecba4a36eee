"""Wheels arrive as they left, and what was damaged on the way is named.

The wheels are real: three installed packages put back into the form they came in, and one of them
is installed by pip from what arrived.
"""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tools import bundle_wheels

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("idna", "six", "mdurl")
PART_BYTES = 40_000


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheels")
    for name in PACKAGES:
        found = importlib.metadata.distribution(name)
        with zipfile.ZipFile(folder / f"{name}-{found.version}-py3-none-any.whl", "w") as wheel:
            for file in found.files or ():
                source = Path(str(found.locate_file(file)))
                kept = ".." not in file.parts and file.suffix != ".pyc"
                if kept and file.name not in ("INSTALLER", "REQUESTED", "direct_url.json"):
                    wheel.write(source, str(file))
    return folder


@pytest.fixture
def bundle(wheels: Path, tmp_path: Path) -> Path:
    assert bundle_wheels.pack(wheels, tmp_path / "bundle", PART_BYTES) > 3
    return tmp_path / "bundle"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_what_arrives_is_what_left_and_no_part_is_too_large(
    wheels: Path, bundle: Path, tmp_path: Path
) -> None:
    sizes = [path.stat().st_size for path in bundle.glob("part.*")]
    assert max(sizes) == PART_BYTES
    assert bundle_wheels.main(["assemble", str(bundle), str(tmp_path / "there")]) == 0
    assert contents(tmp_path / "there") == contents(wheels)


def test_pip_installs_what_arrived(bundle: Path, tmp_path: Path) -> None:
    there, target = tmp_path / "there", tmp_path / "site"
    bundle_wheels.assemble(bundle, there)
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    options = ["--find-links", str(there), "--target", str(target), "idna"]
    subprocess.run([*command, *options], check=True, capture_output=True)
    assert (target / "idna" / "core.py").is_file()


def test_every_damaged_or_missing_part_is_named_and_nothing_is_written(
    bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changed, cut, gone = sorted(bundle.glob("part.*"))[:3]
    data = bytearray(changed.read_bytes())
    data[12_345] ^= 1
    changed.write_bytes(data)
    cut.write_bytes(cut.read_bytes()[:-1])
    gone.unlink()
    assert bundle_wheels.main(["assemble", str(bundle), str(tmp_path / "there")]) == 2
    said = capsys.readouterr().err
    assert f"{changed}: damaged" in said
    assert f"{cut}: {PART_BYTES - 1} bytes" in said
    assert f"{gone}: missing" in said
    assert len(said.strip().splitlines()) == 3
    assert not (tmp_path / "there").exists()


def test_a_damaged_manifest_is_caught(bundle: Path, tmp_path: Path) -> None:
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"][1]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    with pytest.raises(bundle_wheels.BundleError, match="not what was packed"):
        bundle_wheels.assemble(bundle, tmp_path / "there")
    path.write_text("{")
    with pytest.raises(bundle_wheels.BundleError, match=r"manifest\.json"):
        bundle_wheels.assemble(bundle, tmp_path / "there")


def test_two_bundles_are_never_mixed(wheels: Path, bundle: Path) -> None:
    with pytest.raises(bundle_wheels.BundleError, match="not empty"):
        bundle_wheels.pack(wheels, bundle)
