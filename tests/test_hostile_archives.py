"""Files from elsewhere are read, and nothing in them is executed or unpacked."""

import ast
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from sgd_sparse_jax import data
from sgd_sparse_jax.data import archives

ROOT = Path(__file__).parents[1]
MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "yaml"}
FUNCTIONS = {"eval", "exec", "compile", "__import__"}  # as methods they are flax's and re's
METHODS = {"extractall", "extract", "unpack_archive", "read_pickle", "to_pickle", "Unpickler"}


def is_dangerous(node):
    """Whether it imports or calls what may execute or unpack its input."""
    if isinstance(node, ast.Import):
        return any(alias.name.split(".")[0] in MODULES for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        names = {alias.name for alias in node.names}
        return (node.module or "").split(".")[0] in MODULES or bool(names & METHODS)
    if not isinstance(node, ast.Call):
        return False
    called = ast.unparse(node.func)
    given = {word.arg: getattr(word.value, "value", True) for word in node.keywords}
    return (
        called in FUNCTIONS
        or called.rpartition(".")[2] in METHODS
        or given.get("allow_pickle", called == "np.load") is not False
        or given.get("shell", False) is not False
    )


def dangers(source):
    return [ast.unparse(node)[:80] for node in ast.walk(ast.parse(source)) if is_dangerous(node)]


def test_no_module_of_ours_can_execute_or_unpack_what_it_reads():
    bad = """import pickle; import yaml as y; from pickle import loads; eval(x); exec(x)
from shutil import unpack_archive; tar.extractall(); tar.extract(member); shutil.unpack_archive(x)
np.load(x); np.load(x, allow_pickle=y); np.load(x, allow_pickle=True)
read_pickle(x); run(x, shell=True)"""
    assert len(dangers(bad)) == 14
    assert not dangers("np.load(x, allow_pickle=False); re.compile(x); tar.extractfile(member)")
    parts = ("sgd_sparse_jax", "experiments", "benchmarks")
    sources = [path for part in parts for path in (ROOT / part).rglob("*.py")]
    assert len(sources) > 50
    assert not {path: lines for path in sources if (lines := dangers(path.read_text()))}


class Trap:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_arrays_are_never_unpickled(tmp_path):
    folder, sprung = tmp_path / "cifar10", tmp_path / "sprung"
    folder.mkdir()
    np.save(folder / "train_images.npy", np.zeros((4, 32, 32, 3), np.uint8))
    path = folder / "train_labels.npy"
    np.save(path, np.array([Trap(sprung)] * 4, object))
    for content in (path.read_bytes(), pickle.dumps(Trap(sprung))):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=str(path)):
            data.load_images("cifar10", "train", data_dir=tmp_path)
    assert not sprung.exists()
    pickle.loads(content)
    assert sprung.exists()  # the trap works


def test_an_archive_is_opened_only_if_it_is_the_official_one(tmp_path):
    for name, source in archives.SOURCES.items():
        folder = tmp_path / "downloads" / "manual" / name
        folder.mkdir(parents=True)
        for url, *_ in source.archives:
            with tarfile.open(folder / url.rpartition("/")[2], "w:gz") as tar:
                tar.add(__file__, "../../outside.py")
        with pytest.raises(ValueError, match=str(folder)):
            data.load_images(name, "train", data_dir=tmp_path)
        assert not list((tmp_path / name).iterdir()) and not list(tmp_path.rglob("outside*"))
