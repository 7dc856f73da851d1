"""The wheel contains the library, its types and license, and no other files; and it can be used."""

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path, PurePosixPath

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ["sgd_sparse_jax", "experiments", "tests", "benchmarks", "docs", ".ci"]
# hatchling respects .gitignore
FILES = ["pyproject.toml", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff", ".gitignore"]


def run(*command, **options):
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The sdist of a copy, and the wheel built from it, without network."""
    copy, out = tmp_path_factory.mktemp("copy"), tmp_path_factory.mktemp("out")
    for folder in FOLDERS:
        if (ROOT / folder).exists():
            shutil.copytree(
                ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__")
            )
    for file in FILES:
        shutil.copy(ROOT / file, copy)
    build = [sys.executable, "-m", "hatchling", "build", "-d", out, "-t"]
    run(*build, "sdist", cwd=copy)
    (sdist,) = out.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(out, filter="data")
    run(*build, "wheel", cwd=out / sdist.name.removesuffix(".tar.gz"))
    (wheel,) = out.glob("*.whl")
    return sdist, wheel


@pytest.fixture(scope="module")
def wheel(built):
    """Entries by name."""
    with zipfile.ZipFile(built[1]) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


@pytest.fixture(scope="module")
def installed(built, tmp_path_factory):
    """An environment with the wheel, in which the packages of this one are found, too."""
    folder = tmp_path_factory.mktemp("environment")
    run(sys.executable, "-m", "venv", folder)
    run(folder / "bin" / "pip", "install", "--no-index", "--no-deps", built[1])
    (packages,) = folder.glob("lib/python*/site-packages")
    # A .pth file in that folder, such as the one of an editable installation, is not read.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return folder


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


def test_the_sdist_has_the_notes_on_versions_and_how_to_cite(built):
    with tarfile.open(built[0]) as archive:
        names = {
            PurePosixPath(name).relative_to(f"{built[0].name[:-7]}") for name in archive.getnames()
        }
    assert {PurePosixPath(name) for name in ("CHANGELOG.md", "CITATION.cff", "README.md")} <= names


def test_the_version_is_the_same_everywhere():
    version = re.search(r'(?m)^version = "(.*)"$', (ROOT / "pyproject.toml").read_text())[1]
    assert f"\nversion: {version}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {version}" in (ROOT / "CHANGELOG.md").read_text()


@pytest.mark.slow
def test_the_first_example_of_the_readme_runs_elsewhere(installed, tmp_path):
    text = (ROOT / "README.md").read_text("utf-8")
    example = re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]
    where = "import sgd_sparse_jax; print(sgd_sparse_jax.__file__)\n"
    shown = run(installed / "bin" / "python", "-I", "-c", where + example, cwd=tmp_path)
    place, shape = shown.splitlines()
    assert Path(place).is_relative_to(installed) and shape == "(64, 3, 3)"


@pytest.mark.slow
def test_type_checkers_know_the_types_of_the_installed_package(installed, tmp_path):
    """At least 95 %; basedpyright exits with 1 below 100 %, and finds packages by PATH."""
    checker = [sys.executable, "-m", "basedpyright", "--ignoreexternal", "--outputjson"]
    done = subprocess.run(
        [*checker, "--verifytypes", "sgd_sparse_jax"],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{installed / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": ""},
        capture_output=True,
        timeout=120,
    )
    found = json.loads(done.stdout)["typeCompleteness"]
    assert found["completenessScore"] >= 0.95 and len(found["modules"]) > 50
