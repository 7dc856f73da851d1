"""Finished parts of toy runs, of this run or another's: only what fits is taken, and that whole.

Here 300 malformed blocks, 120 malformed words beside a saved state and 60 malformed data sets.
"""

import functools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from experiments import diag_nets, phase_diagram
from experiments.storage import npz
from experiments.toy import chunks, ensemble
from sgd_sparse_jax import train

TOY = diag_nets.problems.diagonal(n=12, d=16, support=2)
CONFIG = replace(
    diag_nets.SETTINGS["d1"], seeds=5, num_steps=300, n=12, d=16, support=2, spectra_records=3
)


@pytest.fixture(scope="module")
def whole():
    """The data, and the blocks that they came from, each with 2 of the 5 seeds."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ensemble, "RUNS_AT_A_TIME", 1)
        kept = {}
        dataset = ensemble.simulate(CONFIG, TOY, lambda name: kept.setdefault(name, {}))
        (blocks,) = kept.values()
        yield dataset, blocks


@functools.cache
def due():
    everything = np.arange(len(CONFIG.step_sizes))
    return ensemble.of_each_seed(CONFIG, TOY, *ensemble.program(CONFIG, TOY, everything))


@functools.cache
def ours():
    return ensemble.blank(CONFIG, TOY)


def test_what_a_block_holds_is_known_without_running_it(whole):
    """By names, shapes and dtypes; here every block of a run fits."""
    _, blocks = whole
    assert sum(len(block["end/theta"]) for block in blocks.values()) == 5
    for first, block in blocks.items():
        assert ensemble._misfit(block, due(), first, 5) is None


@settings(max_examples=300)
@given(st.data())
def test_a_block_with_anything_amiss_is_no_block(whole, data):
    """300 blocks: an array missing, one too many, of another length, shape or kind."""
    _, blocks = whole
    first = data.draw(st.sampled_from(sorted(blocks)))
    block = dict(blocks[first])
    name = data.draw(st.sampled_from(sorted(block)))
    array = block[name]
    others = [array[:-1], array[..., None], array[None], array.astype("f4"), array.astype("U3")]
    others += [np.concatenate([array] * 3), array[..., :0], np.zeros(()), array[:, :-1]]
    kind = data.draw(st.sampled_from(["lost", "more", "other", "renamed", "first"]))
    if kind == "lost":
        del block[name]
    elif kind == "more":
        block[data.draw(st.sampled_from(["x", "step", "step/x", "of_one/x", ""]))] = array
    elif kind == "renamed":
        block[f"{name}x"] = block.pop(name)
    elif kind == "first":
        first = 4 if first == 0 else 0
    else:
        block[name] = data.draw(st.sampled_from(others))
    assert ensemble._misfit(block, due(), first, 5)


def test_a_run_goes_on_around_what_does_not_fit(whole, tmp_path, caplog):
    """Blocks on disk, one damaged, one of another's shape: the data are those of a whole run."""
    dataset, blocks = whole
    kept = chunks.Chunks(tmp_path, "batch1")
    starts = sorted(blocks)
    for first in starts:
        kept[first] = blocks[first]
    kept[starts[0]] = blocks[starts[0]] | {"step/train_loss": np.zeros((2, 9))}
    (tmp_path / "chunks" / f"batch1-{starts[-1]}.npz").write_bytes(b"damaged")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ensemble, "RUNS_AT_A_TIME", 1)
        again = ensemble.simulate(CONFIG, TOY, lambda name: chunks.Chunks(tmp_path, name))
    for name in dataset:
        np.testing.assert_allclose(again[name], dataset[name], rtol=1e-10, atol=1e-14)
    assert "seeds 0 … is no use (step/train_loss is float64[9] per run" in caplog.text
    assert "these runs are computed again" in caplog.text


def amiss(dataset, kind, number):
    """A data set of other names, sizes, labels or kinds."""
    name, axis = (sorted(map(str, d))[number % len(d)] for d in (dataset, dataset.coords))
    if kind == "lost":
        return dataset.drop_vars(name)
    if kind == "more":
        return dataset.assign(x=dataset[name])
    if kind == "short":
        return dataset.isel({axis: slice(1, None)})
    if kind == "label":
        values = dataset[axis].values
        return dataset.assign_coords({axis: values[::-1] if len(values) > 1 else values + values})
    if kind == "words":
        return dataset.assign({name: dataset[name].astype(str)})
    return dataset.assign({name: dataset[name].transpose()})


@pytest.mark.filterwarnings("ignore:Generating overly large repr")
@settings(max_examples=60)
@given(st.sampled_from(["lost", "more", "short", "label", "words", "turned"]), st.integers(0, 999))
def test_data_that_are_not_this_runs_are_refused_by_name(whole, tmp_path, kind, number):
    """60 data sets, each whole in itself."""
    dataset, _ = whole
    ensemble.assert_like(dataset, ours(), tmp_path)
    odd = amiss(dataset, kind, number)
    if odd.identical(dataset):
        return
    npz.save_dataset(tmp_path, odd)
    with pytest.raises(
        ValueError, match=r"arrays\.npz isn't what this run gives .*remove .* again"
    ):
        ensemble.assert_like(npz.load_dataset(tmp_path), ours(), tmp_path)


def test_a_map_that_is_not_this_runs_is_refused(tmp_path):
    config = phase_diagram.Config(seeds=2, step_sizes=(0.1, 0.2), values=(0.5,), axis="decay_time")
    names = ("outcome", "noise_level", "train_loss", "test_loss", "rank")
    axes = {"step_size": np.array(config.step_sizes), "decay_time": np.array(config.values)}
    good = train.labelled({name: np.zeros((2, 2)) for name in names}, axes=axes)
    npz.save_dataset(tmp_path, good)
    assert phase_diagram.found(config, tmp_path).identical(good)
    for odd in (
        good.drop_vars("rank"),
        good.isel(seed=[0]),
        good.isel(step_size=[1, 0]),
        good.transpose(),
        good.rename({"decay_time": "x"}),
    ):
        npz.save_dataset(tmp_path, odd)
        with pytest.raises(ValueError, match=r"arrays\.npz isn't what .*; remove .* and run again"):
            phase_diagram.found(config, tmp_path)
