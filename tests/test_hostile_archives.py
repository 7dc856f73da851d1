"""Untrusted files are read, and nothing in them is executed or extracted."""

import pickle
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from sgd_sparse_jax import data
from sgd_sparse_jax.data import archives

ROOT = Path(__file__).parents[1]
DANGEROUS = re.compile(
    r"^\s*(?:import|from) (?:c?[pP]ickle|dill|cloudpickle|joblib|marshal|shelve|yaml)\b"
    r"|(?<![.\w])(?:eval|exec|compile|__import__)\(|\.extract(?:all)?\(|unpack_archive|_pickle\("
    r"|shell=True|np\.load\((?!.*allow_pickle=False)|allow_pickle=(?!False)",
    re.MULTILINE,
)


def test_no_module_executes_or_extracts_files():
    bad = """import pickle|from dill import loads|eval(x)|__import__(x)|tar.extractall()
tar.extract(m)|np.load(x)|f(x, allow_pickle=y)|read_pickle(x)|unpack_archive(x)|f(x, shell=True)"""
    assert all(map(DANGEROUS.search, re.split(r"[|\n]", bad)))
    assert not DANGEROUS.search("np.load(x, allow_pickle=False); re.compile(x); tar.extractfile(m)")
    parts = ("sgd_sparse_jax", "experiments", "benchmarks")
    sources = [path for part in parts for path in (ROOT / part).rglob("*.py")]
    assert len(sources) > 50
    found = {path.name for path in sources if DANGEROUS.search(path.read_text())}
    # Its subclass of Unpickler calls nothing: tests/test_data_forms.py.
    assert found == {"released.py"}
    text = (ROOT / "sgd_sparse_jax" / "data" / "released.py").read_text()
    assert re.findall(r"pickle\.\w+", text) == ["pickle.Unpickler"]
    assert not DANGEROUS.search(text.replace("import pickle\n", ""))


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
