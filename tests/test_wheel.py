"""The wheel contains the library, its types and license, and no other files."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ["sgd_sparse_jax", "experiments", "tests", "benchmarks", "docs", ".ci"]
FILES = ["pyproject.toml", "README.md", "LICENSE", ".gitignore"]  # hatchling respects .gitignore


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """A wheel built from a copy, without network: entries by name."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("out")
    for folder in FOLDERS:
        if (ROOT / folder).exists():
            shutil.copytree(
                ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__")
            )
    for file in FILES:
        shutil.copy(ROOT / file, copy)
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", out]
    run = subprocess.run(command, cwd=copy, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    (path,) = out.iterdir()
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def test_every_file_of_the_library_is_in_the_wheel_and_unchanged(wheel):
    files = (path for path in (ROOT / "sgd_sparse_jax").rglob("*") if path.is_file())
    paths = sorted(path for path in files if "__pycache__" not in path.parts)
    assert paths
    for path in paths:
        assert wheel.get(path.relative_to(ROOT).as_posix()) == path.read_bytes(), path


def test_types_and_license_are_in_the_wheel(wheel):
    assert "sgd_sparse_jax/py.typed" in wheel
    (text,) = (wheel[name] for name in wheel if name.endswith("dist-info/licenses/LICENSE"))
    assert text == (ROOT / "LICENSE").read_bytes()
    (metadata,) = (wheel[name].decode() for name in wheel if name.endswith("METADATA"))
    assert "License-Expression: Apache-2.0" in metadata.splitlines()


def test_the_wheel_has_no_other_files(wheel):
    tops = {PurePosixPath(name).parts[0] for name in wheel}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"sgd_sparse_jax"}
    assert {PurePosixPath(name).suffix for name in wheel if name.startswith("sgd_")} <= {
        ".py",
        ".typed",
        ".json",  # names of classes
        ".tsv",  # addresses and checksums of archives
        "",  # dist-info
    }
