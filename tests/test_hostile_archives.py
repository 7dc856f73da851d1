"""Archives made to harm: nothing leaves them but pixels and labels, or a line with a cure.

And the law behind it: no module of ours has a way to execute, or to unpack, what it reads.
"""

import ast
import hashlib
import io
import re
import subprocess
import tarfile
import zipfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from PIL import Image

from sgd_sparse_jax.data import builders
from sgd_sparse_jax.data.images import load_images

ROOT = Path(__file__).parents[1]
SOURCES = [
    path
    for part in ("sgd_sparse_jax", "experiments", "benchmarks")
    for path in (ROOT / part).rglob("*.py")
]
FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "joblib",
    "marshal",
    "shelve",
    "yaml",
}
FORBIDDEN_CALLS = {
    "eval",
    "exec",
    "compile",
    "__import__",
    "extractall",
    "extract",
    "unpack_archive",
}
FORBIDDEN_CALLS |= {"read_pickle", "to_pickle", "Unpickler"}


def dangers(source):
    """Lines on which `source` imports or calls what may execute or unpack its input."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = {alias.name.split(".")[0] for alias in node.names} & FORBIDDEN_MODULES
        elif isinstance(node, ast.ImportFrom):
            whole = {(node.module or "").split(".")[0]}
            names = whole & FORBIDDEN_MODULES | {a.name for a in node.names} & FORBIDDEN_CALLS
        elif isinstance(node, ast.Call):
            named = isinstance(node.func, ast.Name) and node.func.id in FORBIDDEN_CALLS
            method = isinstance(node.func, ast.Attribute) and node.func.attr in (
                FORBIDDEN_CALLS - {"eval", "exec", "compile"}  # flax and re have such methods
            )
            pickles = [k for k in node.keywords if k.arg == "allow_pickle"]
            loose = any(getattr(k.value, "value", True) is not False for k in pickles)
            shell = any(k.arg == "shell" and getattr(k.value, "value", True) for k in node.keywords)
            loads = isinstance(node.func, ast.Attribute) and ast.unparse(node.func) == "np.load"
            names = {"call"} if named or method or loose or shell or (loads and not pickles) else ()
        else:
            continue
        found += [f"{node.lineno}: {ast.unparse(node)[:80]}"] if names else []
    return found


def test_no_module_of_ours_can_execute_or_unpack_what_it_reads():
    assert len(SOURCES) > 50
    found = {path.relative_to(ROOT): dangers(path.read_text()) for path in SOURCES}
    assert {path: lines for path, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "source",
    [
        *(
            "import pickle",
            "import yaml as y",
            "from pickle import loads",
            "from shutil import unpack_archive",
        ),
        *(
            "eval(x)",
            "exec(x)",
            "def f():\n    return __import__(x)",
            "tar.extractall()",
            "zip.extractall(p)",
        ),
        *(
            "shutil.unpack_archive(x)",
            "tar.extract(member)",
            "np.load(x)",
            "np.load(x, allow_pickle=True)",
        ),
        *("np.load(x, allow_pickle=y)", "subprocess.run(x, shell=True)", "pandas.read_pickle(x)"),
    ],
)
def test_the_law_sees_each_way(source):
    assert dangers(source)


def test_the_law_lets_through_what_is_harmless():
    assert not dangers("np.load(x, allow_pickle=False)\nre.compile(x)\ntar.extractfile(member)")
    assert not dangers("from flax import serialization\nmodel.eval()\nsubprocess.run(['git'])")


def refused(examples, archive):
    """Whether reading ends in a line that names the archive and the cure."""
    with pytest.raises(ValueError, match=r"whole.*: delete it and download it again") as error:
        list(examples)
    assert str(archive) in str(error.value) and "\n" not in str(error.value)
    return True


CIFAR = partial(builders.cifar_examples, files=builders.CIFAR10_FILES, labels=("label",))
RECORDS = np.arange(3073 * 2).astype(np.uint8).tobytes()


def tarred(path, *extra):
    """The test split of CIFAR-10, two images, and members that are not its own."""
    with tarfile.open(path, "w:gz") as tar:
        for name, kind, target in extra:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            member.size = 4 if kind == tarfile.REGTYPE else 0
            tar.addfile(member, io.BytesIO(b"evil") if member.size else None)
    return path


def with_records(path, *extra):
    with tarfile.open(path, "w:gz") as tar:
        member = tarfile.TarInfo("cifar-10-batches-bin/test_batch.bin")
        member.size = len(RECORDS)
        tar.addfile(member, io.BytesIO(RECORDS))
        for name, kind, target in extra:
            other = tarfile.TarInfo(name)
            other.type, other.linkname = kind, target
            tar.addfile(other)
    return path


KINDS = {
    "symlink": tarfile.SYMTYPE,
    "hard link": tarfile.LNKTYPE,
    "device": tarfile.CHRTYPE,
    "pipe": tarfile.FIFOTYPE,
    "folder": tarfile.DIRTYPE,
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("target", ["/etc/passwd", "../../outside", "x/test_batch.bin", ""])
def test_links_and_devices_are_not_files_of_a_data_set(tmp_path, kind, target):
    """Not even where they have the name of one; a link to itself doesn't run forever."""
    hostile = ("x/test_batch.bin", KINDS[kind], target)
    assert refused(CIFAR([tarred(tmp_path / "a.tar.gz", hostile)], "test"), tmp_path / "a.tar.gz")
    path = with_records(tmp_path / "b.tar.gz", hostile, ("../../up", KINDS[kind], target))
    assert len(list(CIFAR([path], "test"))) == 2
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["a.tar.gz", "b.tar.gz"]


@pytest.mark.parametrize("name", ["../../outside.bin", "/outside.bin", "a/../../outside.bin"])
def test_members_outside_of_an_archive_stay_in_it(tmp_path, name):
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    path = tarred(folder / "a.tar.gz", (name, tarfile.REGTYPE, ""))
    assert refused(CIFAR([path], "test"), path)
    zipped = folder / "b.zip"
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr(name, b"evil")
        archive.writestr("tiny-imagenet-200/wnids.txt", "n01443537\n")
    assert list(builders.tiny_imagenet_examples([zipped], "train")) == []
    assert not list(tmp_path.rglob("outside*")) and not Path("/outside.bin").exists()


def damage(draw, whole):
    """Cut, or with one byte changed."""
    at = draw(st.integers(0, len(whole) - 1))
    if draw(st.booleans()):
        return whole[:at]
    return whole[:at] + bytes([whole[at] ^ draw(st.integers(1, 255))]) + whole[at + 1 :]


@settings(max_examples=100)
@given(st.data())
def test_a_damaged_tar_is_refused_or_whole(tmp_path, data):
    """100 archives."""
    path = with_records(tmp_path / "a.tar.gz")
    path.write_bytes(data.draw(st.binary(max_size=50)) or damage(data.draw, path.read_bytes()))
    try:
        assert len(list(CIFAR([path], "test"))) == 2
    except ValueError as error:
        assert str(path) in str(error) and "delete it and download it again" in str(error)


def tiny(path, picture, how=zipfile.ZIP_DEFLATED):
    """A Tiny ImageNet of one training image."""
    with zipfile.ZipFile(path, "w", how) as archive:
        archive.writestr("tiny-imagenet-200/wnids.txt", "n01443537\n")
        member = "tiny-imagenet-200/train/n01443537/images/n01443537_0.JPEG"
        archive.writestr(member, picture)
    return path


def drawn(kind="JPEG", size=(64, 64)):
    file = io.BytesIO()
    Image.new("RGB", size, (9, 9, 9)).save(file, kind)
    return file.getvalue()


@pytest.mark.parametrize(
    "picture",
    [
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nevil\n%%EOF\n",
        *(b"", b"evil", drawn("PNG"), drawn("BMP"), drawn(size=(65, 64)), drawn("EPS")),
        drawn()[:-200] + b"\0" * 9,
    ],
)
def test_an_image_is_a_jpeg_of_its_size_and_runs_no_other_program(tmp_path, monkeypatch, picture):
    """Pillow hands PostScript to another program, wherever it may choose the format."""
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *command, **_: started.append(command))
    path = tiny(tmp_path / "a.zip", picture)
    assert refused(builders.tiny_imagenet_examples([path], "train"), path)
    assert started == []


def test_a_picture_that_would_fill_the_memory_is_refused_by_its_header(tmp_path):
    huge = drawn().replace(b"\x08\x00\x40\x00\x40\x03", b"\x08\xff\xff\xff\xff\x03")
    path = tiny(tmp_path / "a.zip", huge)
    assert refused(builders.tiny_imagenet_examples([path], "train"), path)


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged tags
@settings(max_examples=100)
@given(st.data(), st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
def test_a_damaged_zip_is_refused_or_whole(tmp_path, data, how):
    """100 archives; encrypted members and unknown compressions are among them."""
    path = tiny(tmp_path / "a.zip", drawn(), how)
    path.write_bytes(damage(data.draw, path.read_bytes()))
    try:
        images = list(builders.tiny_imagenet_examples([path], "train"))
        assert all((image == 9).all() for image, _ in images)
    except ValueError as error:
        assert str(path) in str(error) and "delete it and download it again" in str(error)


def matlab(path, **arrays):
    from scipy.io import savemat

    savemat(path, arrays)
    return path


X, Y = np.zeros((32, 32, 3, 2), np.uint8), np.array([[1], [10]], np.uint8)
CELL = np.empty((32, 32, 3, 2), object)
CELL[:] = "system('evil')"


@pytest.mark.parametrize(
    "wrong",
    [
        *({"X": CELL}, {"X": X.astype(float)}, {"X": X[:16]}, {"X": {"a": 1}}, {"X": "evil"}),
        *({"y": Y[:1]}, {"y": Y + 5}, {"y": CELL[0, 0, 0]}, {"y": {"a": 1}}, {"y": Y * np.nan}),
    ],
)
def test_objects_of_matlab_are_no_images(tmp_path, wrong):
    path = matlab(tmp_path / "a.mat", **({"X": X, "y": Y} | wrong))
    assert refused(builders.svhn_examples([path], "train"), path)
    good = matlab(tmp_path / "b.mat", X=X, y=Y, more=CELL)
    assert [label["label"] for _, label in builders.svhn_examples([good], "train")] == [1, 0]


def test_functions_of_matlab_are_read_as_inert_arrays():
    """SciPy has no interpreter for them: what it gives has nothing to call, and we look at none."""
    import scipy.io

    inside = Path(scipy.io.__file__).parent / "matlab" / "tests" / "data"
    files = [*inside.glob("*func*.mat"), *inside.glob("testobject*.mat")]
    if not files:
        pytest.skip("SciPy came without its own tests")
    for path in files:
        content = scipy.io.loadmat(path)
        functions = [v for k, v in content.items() if not k.startswith("__")]
        assert functions and all(isinstance(value, np.ndarray) for value in functions)
        assert not any(map(callable, functions))
        assert refused(builders.svhn_examples([path], "train"), path)
    for module in ("_mio", "_mio4", "_mio5", "_miobase"):
        source = (inside.parents[1] / f"{module}.py").read_text()
        assert not re.search(r"\b(eval|exec|import_module)\(|pickle", source)


@pytest.mark.parametrize("name", ["cifar10", "svhn", "tiny_imagenet"])
def test_a_hostile_archive_leaves_nothing_prepared(tmp_path, name):
    """All the way, through TFDS: as if it had the official checksum."""
    folder = tmp_path / "downloads" / "manual" / name
    folder.mkdir(parents=True)
    entries = []
    for archive in builders.SOURCES[name].archives:
        path = folder / archive.url.rpartition("/")[2]
        if name == "cifar10":
            tarred(path, ("x/test_batch.bin", tarfile.SYMTYPE, "/etc/passwd"))
        elif name == "svhn":
            matlab(path, X=CELL, y=Y)
        else:
            tiny(path, b"%!PS-Adobe-3.0 EPSF-3.0\n")
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        entries.append(archive._replace(size=len(content), sha256=digest))
    source = builders.SOURCES[name]._replace(archives=tuple(entries))
    prepare = partial(builders.prepare, source=source)
    with pytest.raises(ValueError, match="delete it and download it again"):
        load_images(name, "test", data_dir=tmp_path, prepare=prepare)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["downloads"]
