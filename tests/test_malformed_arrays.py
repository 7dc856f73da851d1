"""Archives of arrays, parts of sweeps, caches and saved states that others damaged or made.

How many malformed inputs each reader is given stands beside it: 1,010 in all.
"""

import io
import json
import logging
import pickle
import shutil
import warnings
import zipfile

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings, strategies as st
from traps import (
    REFUSED,
    TRAP,
    Trap,
    answer,
    nothing_is_executed as nothing_is_executed,
)

from experiments.storage import npz
from experiments.toy import chunks
from sgd_sparse_jax import train
from sgd_sparse_jax.types import TrainState

PATIENT = settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
ARRAYS = {"a": np.arange(40.0).reshape(8, 5), "b": np.array(["x", "η"]), "c": np.array(7)}


def npy(array):
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), allow_pickle=True)
    return file.getvalue()


def zipped(members, how=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about names that occur twice
        with zipfile.ZipFile(file, "w", how) as archive:
            for name, content in members:
                archive.writestr(name, content)
    return file.getvalue()


def header(text, body=b"\0" * 64):
    """An array whose header says `text`."""
    line = text.encode() + b" " * (118 - len(text)) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(line).to_bytes(2, "little") + line + body


LIES = [
    f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}}}"
    for descr, order, shape in (
        *(("'<f8'", False, shape) for shape in ("(7,)", "(9,)", "(-1,)", "(4294967296,)*2", "()")),
        *(("'<f8'", False, shape) for shape in ("(1099511627776,)", "(2,2**9)", "8", "(1.5,)")),
        *(
            ("'<f8'", False, shape)
            for shape in ("(0, 4294967296, 4294967296)", "(True,)", "('a',)")
        ),
        *(
            (descr, False, "(2,)")
            for descr in ("'O'", "'V999999999999'", "[('a','O')]", "'x'", "3")
        ),
        *((descr, 2, "(2,)") for descr in ("'<f8'", "'<U9999999999'", "'M8[s]'", "None")),
    )
] + [TRAP, "", "{", "(" * 110, "{'descr': '<f8', 'descr': 'O'}", "1if 1else 2", "{[]: 1}"]
ODD_NAMES = ["../../x.npy", "/x.npy", "a\\b.npy", "a.npy/", "x.txt", "C:x.npy", ".npy", "a.npy"]


@st.composite
def archives(draw):
    """(file, what is wrong with it)."""
    kinds = ["bytes", "cut", "flip", "flip", "objects", "lie", "name", "twice", "bomb", "pickle"]
    kind = draw(st.sampled_from(kinds))
    members = [(f"{name}.npy", npy(array)) for name, array in ARRAYS.items()]
    how = draw(st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
    whole = zipped(members, how)
    at = draw(st.integers(0, len(whole) - 1))
    if kind == "bytes":
        return draw(st.binary(max_size=80)), kind
    if kind == "cut":
        return whole[:at], kind
    if kind == "flip":
        return whole[:at] + bytes([whole[at] ^ draw(st.integers(1, 255))]) + whole[at + 1 :], kind
    if kind == "pickle":
        odd = [pickle.dumps(Trap()), npy(np.ones(3)), npy([Trap()])]
        return draw(st.sampled_from(odd)), kind
    more = {
        "objects": ("d.npy", npy(np.array([Trap()], object))),
        "lie": ("d.npy", header(draw(st.sampled_from(LIES)))),
        "name": (draw(st.sampled_from(ODD_NAMES)), npy(1.0)),
        "twice": draw(st.sampled_from(members)),
        "bomb": ("d.npy", npy(np.zeros(3))[:-24] + b"\0" * 2**20),
    }
    return zipped([*members, more[kind]], how), kind


TOO_LONG = ("x" * 50_000 + ".npy", npy(np.zeros(3)) + b"more")  # a message would quote its name


@pytest.mark.filterwarnings("ignore")  # NumPy's and Python's, about the headers
@settings(PATIENT, max_examples=500)
@example((zipped([TOO_LONG]), "name"))
@given(archives())
def test_an_archive_gives_the_arrays_that_were_saved_or_is_refused(tmp_path, drawn):
    """500 archives, each read in three ways; nothing is unpacked anywhere."""
    content, kind = drawn
    run = tmp_path / "run"
    (run / "chunks").mkdir(parents=True, exist_ok=True)
    places = [run / "arrays.npz", run / "chunks" / "part-0.npz"]
    for path in places:
        path.write_bytes(content)
    got = answer(lambda: npz.load(run), places[0])
    logging.disable(logging.WARNING)
    part = chunks.Chunks(run, "part").get(0)
    logging.disable(logging.NOTSET)
    assert (part is None) == (got is REFUSED)
    if got is not REFUSED:
        assert all(
            type(array) is np.ndarray and not array.dtype.hasobject for array in got.values()
        )
        assert kind in ("flip", "lie", "name") and (kind == "flip" or got.keys() > ARRAYS.keys())
        for name, array in got.items():
            if name in ARRAYS:
                np.testing.assert_array_equal(array, ARRAYS[name])
                assert array.dtype == ARRAYS[name].dtype
    labelled = answer(lambda: npz.load_dataset(run), places[0])
    assert labelled is REFUSED
    assert sorted(tmp_path.rglob("*")) == sorted([run, run / "chunks", *places])


axes = st.recursive(
    st.none() | st.integers() | st.sampled_from(["loss", "seed", "step", "", "\0", TRAP]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["loss", "seed", "step"]), inner, max_size=3)
    ),
)
some_arrays = st.dictionaries(
    st.sampled_from(["loss", "seed", "step", ""]),
    st.sampled_from(
        [
            *(np.zeros(()), np.zeros(3), np.zeros((3, 2)), np.zeros(0), np.array(["a"])),
            *(np.zeros(2, dtype) for dtype in ("M8[s]", "M8", [("a", "f8")], ">f8")),
        ]
    ),
    max_size=3,
)
texts = axes.map(json.dumps) | st.text(max_size=5) | st.sampled_from(["[" * 10**5, TRAP, "NaN"])


@pytest.mark.filterwarnings("ignore")  # xarray's, about coordinates it converts
@settings(PATIENT, max_examples=250)
@example({"x" * 50_000: np.zeros(2)}, "{}", ())
@example({"loss": np.zeros((2, 2))}, '{"loss": ["seed", "seed"]}', ())
@given(some_arrays, texts, st.sampled_from([(), (1,), (2,), None]))
def test_a_data_set_is_what_its_axes_say_or_is_refused(tmp_path, arrays, text, shape):
    """250 data sets."""
    described = {} if shape is None else {npz.AXES: np.full(shape, text)}
    try:
        npz.save(tmp_path, arrays | described)
    except (UnicodeEncodeError, ValueError):
        return
    got = answer(lambda: npz.load_dataset(tmp_path), tmp_path / "arrays.npz")
    if got is not REFUSED:
        assert shape == () and set(got.variables) == set(arrays)
        for name, dims in json.loads(text).items():
            assert name not in arrays or list(got[name].dims) == dims == list(dict.fromkeys(dims))


KEYS, POINTS = jr.split(jr.key(0), 3), jnp.arange(4.0)
sweep = train.make_sweep(lambda key, point: (point * jnp.ones(2), {"u": jr.uniform(key)}), chunk=1)
wrong_arrays = st.dictionaries(
    st.sampled_from(["0", "1", "2", "x", "0/1"]),
    st.tuples(
        st.sampled_from([(), (0,), (1,), (4,), (4, 2), (4, 3), (8, 2), (8,), (12, 2), (13,)]),
        st.sampled_from(["f8", "f8", "f8", "f4", "i8", "U3"]),
    ).map(lambda kind: np.zeros(*kind)),
    max_size=3,
)


@settings(PATIENT, max_examples=200)
@given(st.dictionaries(st.integers(0, 11), wrong_arrays, max_size=3))
def test_parts_of_another_sweep_never_mix_with_this_one(tmp_path, found):
    """200 folders of parts; what fits in every name, number, shape and dtype is as good as ours."""
    shutil.rmtree(tmp_path / "chunks", ignore_errors=True)
    kept = chunks.Chunks(tmp_path, "part")
    for first, arrays in found.items():
        kept[first] = arrays

    def fits(first):
        sizes = {name: (a.shape[1:], a.dtype, len(a)) for name, a in found[first].items() if a.ndim}
        runs = [
            n for n in range(1, 13 - first) if sizes == {"0": ((2,), float, n), "1": ((), float, n)}
        ]
        return runs[0] if runs and len(found[first]) == 2 else 0

    logging.disable(logging.WARNING)
    vectors, scalars = sweep(KEYS, POINTS, kept=kept)
    logging.disable(logging.NOTSET)
    whole = sweep(KEYS, POINTS)
    theirs, start = set(), 0
    while start < 12:
        length = fits(start) if start in found else 0
        theirs |= set(range(start, start + length))
        start += length or min(8, 12 - start)
    ours = [i for i in range(12) if i not in theirs]
    for got, want in ((vectors, whole[0]), (scalars["u"], whole[1]["u"])):
        flat, due = (np.reshape(a, (12, -1)) for a in (got, want))
        np.testing.assert_array_equal(flat[ours], due[ours])
        assert (flat[sorted(theirs)] == 0).all()


def test_parts_that_do_not_fit_are_told_and_written_anew(tmp_path, caplog):
    kept = chunks.Chunks(tmp_path, "part")
    kept[0] = {"0": np.zeros((8, 3)), "1": np.zeros(8)}
    (tmp_path / "chunks" / "part-x.npz").write_bytes(b"")
    assert list(kept) == [0]
    kept[8] = {"0": np.zeros((8, 2)), "1": np.zeros(8)}  # of twice the runs that are left
    vectors, scalars = sweep(KEYS, POINTS, kept=kept)
    np.testing.assert_array_equal(vectors, sweep(KEYS, POINTS)[0])
    assert scalars["u"].all() and "of [8] runs, and up to 4 are due" in caplog.text
    assert "runs 0 … is no use (0 is float64[3] per run and not float64[2]); they run again" in (
        caplog.text
    )
    assert kept[0]["0"].shape == (8, 2) and list(kept) == [0, 8]


def state_at(step):
    return TrainState(jnp.asarray(step, jnp.int32), {"w": jnp.arange(4.0) + step}, {}, (), ())


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    with train.open_checkpoints(folder) as checkpoints:
        for step in (1, 2):
            train.save(checkpoints, state_at(step), {"lr": 0.1}, {"window": {"steps": step}})
    return folder


json_values = st.sampled_from(
    [None, 1, "x", [], {}, [1], {"lr": 0.2}, True, 1e400, "\ud800", -1, 10**30, TRAP, [[]]]
)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@settings(PATIENT, max_examples=60)
@given(st.sampled_from(["_CHECKPOINT_METADATA", "default/_METADATA"]), st.data())
def test_a_state_is_one_that_was_saved_or_is_refused(saved, tmp_path, name, draw):
    """60 descriptions beside a saved state; a state whose own is damaged is passed over."""
    folder = tmp_path / "states"
    shutil.rmtree(folder, ignore_errors=True)
    path = shutil.copytree(saved, folder) / "2" / name
    whole = json.loads(path.read_bytes())
    beside = whole.get("custom_metadata") or whole
    where = draw.draw(st.sampled_from([whole, beside]))
    where[draw.draw(st.sampled_from(list(where)))] = draw.draw(json_values)
    text = json.dumps(whole).encode()
    odd = [b"", b"[" * 10**5, b"\xff", pickle.dumps(Trap()), b"3", text[: len(text) // 2]]
    path.write_bytes(draw.draw(st.just(text) | st.sampled_from(odd)))

    def restored():
        with train.open_checkpoints(folder) as checkpoints:
            return train.restore(checkpoints, state_at(0), {"lr": 0.1})

    logging.disable(logging.ERROR)
    got = answer(restored, folder)
    logging.disable(logging.NOTSET)
    if got is not REFUSED:
        state, progress = got
        jax.tree.map(np.testing.assert_array_equal, state, state_at(int(state.step)))
        assert int(state.step) in (1, 2) and isinstance(progress, dict)
        assert int(state.step) == 2 or (folder / "damaged-2").is_dir()
