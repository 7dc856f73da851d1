"""Arrays come back as they were saved, with the names of their axes, or their file is named."""

import json
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import example, given, settings, strategies as st
from hypothesis.extra import numpy as hnp
from traps import Trap, nothing_is_executed as nothing_is_executed

from experiments.storage import npz

words = st.text(max_size=8) | st.sampled_from(["NaN", "\\NaN", "null", "\u2028", "\ud800", "é\n"])


def names(folder):
    return sorted(path.name for path in folder.iterdir())


ARRAYS = {
    "float": np.array([[1.5, np.nan, -np.inf]]),
    "int": np.arange(5, dtype=np.int16),
    "word": np.array(["η = 1", ""]),
    "empty": np.zeros((0, 3), np.float32),
    "scalar": np.array(2.0),
    "file": np.array([True]),
    "block1/active": np.asfortranarray(np.arange(6).reshape(2, 3)),
}


def test_arrays_come_back(tmp_path):
    npz.save(tmp_path, ARRAYS)
    got = npz.load(tmp_path)
    assert list(got) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(got[name], array)
        assert got[name].dtype == array.dtype
    assert names(tmp_path) == ["arrays.npz"]


def test_nothing_in_an_array_file_is_executed(tmp_path):
    path = tmp_path / "arrays.npz"
    np.savez(path, a=np.array([Trap()], dtype=object))
    with pytest.raises(ValueError, match=r"arrays\.npz"):
        npz.load(tmp_path)
    path.write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"arrays\.npz"):
        npz.load(tmp_path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.npy", pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"arrays\.npz"):
        npz.load(tmp_path)
    path.unlink()
    with pytest.raises(ValueError, match="Object arrays"):
        npz.save(tmp_path, {"a": np.array([Trap()], dtype=object)})
    assert names(tmp_path) == []


def test_a_missing_array_file_is_called_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        npz.load(tmp_path)


@pytest.mark.filterwarnings("ignore")  # the zip reader's, about names that occur twice
@settings(max_examples=50)
@given(st.data())
def test_a_damaged_array_file_is_a_value_error(tmp_path, data):
    npz.save(tmp_path, {"a": np.arange(4.0), "b": np.array(["x"])})
    path = tmp_path / "arrays.npz"
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        del content[at:]
    else:
        content[at] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(content))
    try:
        npz.load(tmp_path)
    except ValueError as error:
        assert str(path) in str(error)


def test_a_labelled_data_set_comes_back_as_it_was(tmp_path):
    import xarray

    dataset = xarray.Dataset(
        {
            "loss": (("seed", "schedule"), np.array([[1.0, np.nan], [-0.0, np.inf]])),
            "rank": (("seed", "record"), np.array([[1, 2, 3], [4, 5, 6]], np.int32)),
        },
        {"seed": [0, 1], "schedule": np.array(["η = 0.1, /3", "b"]), "record": [0, 10, 99]},
    )
    npz.save_dataset(tmp_path, dataset)
    again = npz.load_dataset(tmp_path)
    assert again.identical(dataset)
    assert {n: v.dtype for n, v in again.variables.items()} == {
        n: v.dtype for n, v in dataset.variables.items()
    }


@pytest.mark.parametrize(
    "arrays",
    [
        {"loss": np.zeros(3)},
        {"loss": np.zeros(3), npz.AXES: np.array("{")},
        {"loss": np.zeros(3), npz.AXES: np.array('{"rank": ["seed"]}')},
        {"loss": np.zeros(3), npz.AXES: np.array('{"loss": ["seed", "step"]}')},
    ],
)
def test_arrays_that_are_no_data_set_are_said_to_be_none(arrays, tmp_path):
    npz.save(tmp_path, arrays)
    with pytest.raises(ValueError, match=r"arrays\.npz is no labelled data set .* remove"):
        npz.load_dataset(tmp_path)


dtypes = st.sampled_from([">f8", "f8", "f4", "i8", "i2", "u1", "?", "<U5", "c16"])


@st.composite
def datasets(draw):
    """Variables over some of the axes; of the axes some have coordinates, a string's or a number's.

    Each variable's name could be a path in an archive, and one is a keyword of NumPy's writer.
    """
    import xarray

    sizes = draw(st.dictionaries(st.sampled_from(["seed", "η", "step"]), st.integers(0, 3)))
    names = draw(st.lists(st.sampled_from(["loss", "file", "a/b", "rank"]), unique=True))
    variables = {}
    for name in names:
        dims = draw(st.lists(st.sampled_from(list(sizes)), unique=True)) if sizes else []
        shape = tuple(sizes[dim] for dim in dims)
        variables[name] = (dims, draw(hnp.arrays(np.dtype(draw(dtypes)), shape)))
    coords = {
        dim: draw(hnp.arrays(np.dtype(draw(dtypes)), size))
        for dim, size in sizes.items()
        if draw(st.booleans())
    }
    return xarray.Dataset(variables, coords)


@settings(max_examples=200)
@given(datasets())
def test_any_labelled_data_set_comes_back_with_its_names_and_dtypes(tmp_path, dataset):
    npz.save_dataset(tmp_path, dataset)
    again = npz.load_dataset(tmp_path)
    assert again.identical(dataset)
    assert set(again.coords) == set(dataset.coords)
    for name, variable in dataset.variables.items():
        got = again.variables[name]
        assert (got.dims, got.dtype.str) == (variable.dims, variable.dtype.str)
    assert names(tmp_path) == ["arrays.npz"]


def test_a_value_is_found_again_by_its_labels(tmp_path):
    import xarray

    loss = np.arange(6.0).reshape(2, 3)
    coords = {"step": [0, 10, 99], "schedule": ["η = 0.1", "b"]}
    npz.save_dataset(tmp_path, xarray.Dataset({"loss": (("schedule", "step"), loss)}, coords))
    again = npz.load_dataset(tmp_path)
    assert again["loss"].sel(schedule="b", step=10).item() == 4
    assert again["loss"].sel(schedule="η = 0.1", step=99).item() == 2


json_scalars = st.none() | st.booleans() | st.integers(-5, 5) | words
axes_of_arrays = st.dictionaries(
    st.sampled_from(["loss", "seed", "other"]),
    st.lists(st.sampled_from(["seed", "loss", "step"]) | json_scalars, max_size=3) | json_scalars,
)


@pytest.mark.filterwarnings("ignore:Duplicate dimension names")
@settings(max_examples=200)
@example({"loss": "seed"})
@example({"loss": [["seed"]], "seed": ["seed"]})
@example({"loss": ["seed", "seed"], "seed": ["seed"]})
@given(axes_of_arrays | json_scalars | st.lists(json_scalars, max_size=2))
def test_any_names_of_axes_fit_or_are_a_value_error_that_names_the_file(tmp_path, axes):
    arrays = {"loss": np.zeros((3, 2)), "seed": np.arange(3)}
    npz.save(tmp_path, arrays | {npz.AXES: np.array(json.dumps(axes))})
    try:
        dataset = npz.load_dataset(tmp_path)
    except ValueError as error:
        assert str(tmp_path / "arrays.npz") in str(error)
        assert f"remove {tmp_path}" in str(error)
    else:
        assert dataset["loss"].dims == tuple(axes["loss"])
        assert dataset["loss"].shape == (3, 2)


@pytest.mark.filterwarnings("ignore")  # the zip reader's, about names that occur twice
@settings(max_examples=50)
@given(st.data())
def test_a_cut_data_set_is_a_value_error_that_names_the_file(tmp_path, data):
    import xarray

    dataset = xarray.Dataset({"loss": (("seed",), np.arange(3.0))}, {"seed": ["a", "b", "c"]})
    npz.save_dataset(tmp_path, dataset)
    path = tmp_path / "arrays.npz"
    content = path.read_bytes()
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    with pytest.raises(ValueError) as error:
        npz.load_dataset(tmp_path)
    assert str(path) in str(error.value)
    assert f"remove {tmp_path}" in str(error.value)


def test_a_folder_without_a_data_set_is_called_so(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        npz.load_dataset(tmp_path)
    assert "arrays.npz" in str(error.value)
    npz.save(tmp_path, {"loss": np.zeros(3)})
    with pytest.raises(ValueError, match="no labelled data set") as error:
        npz.load_dataset(tmp_path)
    assert str(tmp_path / "arrays.npz") in str(error.value)
