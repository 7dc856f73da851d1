"""Restored states equal the saved ones, or an error states the reason."""

import contextlib
import gc
import logging
import shutil
import time

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from sgd_sparse_jax import train
from sgd_sparse_jax.train.checkpoint import digest
from sgd_sparse_jax.types import TrainState

# If one array can't be read, orbax abandons the reads of the others, which raise later or when they
# are collected. The fixture makes that happen within the test that caused it.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ABOUT = {"model": "resnet18_plain", "model_width": 16, "l2_reg": 5e-4, "no_data_augm": False}
W = jr.normal(jr.key(0), (64, 64), jnp.float32)


def state_at(step):
    """A state that differs at every step, in two precisions, without an average."""
    params = {"Dense": {"kernel": W + step, "bias": jnp.arange(5.0) + step}}
    trace = ({"trace": W * step},)
    return TrainState(jnp.asarray(step, jnp.int32), params, {"m": jnp.ones(3) * step}, trace, ())


LIKE = jax.tree.map(jnp.zeros_like, state_at(0))


@pytest.fixture(autouse=True)
def abandoned_reads(request):
    yield
    if "damage" in request.node.name:
        time.sleep(0.1)
        gc.collect()


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    with train.open_checkpoints(folder) as checkpoints:
        for step in (1, 2):
            train.save(checkpoints, state_at(step), ABOUT, {"loss_sum": 0.1 + 0.2, "at": step})
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "checkpoints")


def restored(folder, like=LIKE, about=ABOUT):
    """The newest state."""
    with train.open_checkpoints(folder) as checkpoints:
        state, _ = train.restore(checkpoints, like, about)
    return state


def assert_is(state, step):
    jax.tree.map(np.testing.assert_array_equal, state, state_at(step))


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def damage(folder, step, how):
    """Changes the file that contains the arrays."""
    files = [path for path in (folder / str(step)).rglob("d/*") if path.is_file()]
    path = max(files, key=lambda path: path.stat().st_size)
    path.write_bytes(how(path.read_bytes()))


def flipped(raw):
    middle = len(raw) // 2
    return raw[:middle] + bytes([raw[middle] ^ 0x10]) + raw[middle + 1 :]


DAMAGES = {
    "emptied": lambda raw: b"",
    "truncated": lambda raw: raw[: len(raw) // 2],
    "one bit flipped": flipped,
}


def test_the_newest_state_and_its_progress_come_back_exactly(folder, tmp_path):
    with train.open_checkpoints(folder) as checkpoints:
        state, progress = train.restore(checkpoints, LIKE, ABOUT)
    assert_is(state, 2)
    assert progress == {"loss_sum": 0.1 + 0.2, "at": 2}
    with train.open_checkpoints(tmp_path / "new") as checkpoints:
        assert train.restore(checkpoints, LIKE, ABOUT) is None


def test_a_save_is_independent_of_donated_buffers(tmp_path):
    """Buffers are donated while the save is running."""
    consume = jax.jit(lambda state: jax.tree.map(lambda x: x * 0, state), donate_argnums=0)
    with train.open_checkpoints(tmp_path) as checkpoints:
        for step in (1, 2):
            state = state_at(step)
            train.save(checkpoints, state, ABOUT)
            consume(state)
    assert_is(restored(tmp_path), 2)


def test_the_newest_are_kept_and_saving_a_step_twice_is_an_error(folder):
    (folder / "3.orbax-checkpoint-tmp").mkdir()  # left by a killed save
    with train.open_checkpoints(folder, read_only=True) as checkpoints:
        assert checkpoints.all_steps() == [1, 2]
    assert len(names(folder)) == 3
    with train.open_checkpoints(folder, keep=2) as checkpoints:
        train.save(checkpoints, state_at(3), ABOUT)
        for step in (1, 3):
            with pytest.raises(ValueError):
                train.save(checkpoints, state_at(step), ABOUT)
    assert names(folder) == ["2", "3"]


@pytest.mark.parametrize("kind", [*DAMAGES, "description"])
def test_a_damaged_newest_state_is_moved_aside_with_a_warning(folder, kind, caplog):
    """And saved again by the run that continues from the previous state."""
    if kind == "description":
        (folder / "2" / "_CHECKPOINT_METADATA").write_text("{")
    else:
        damage(folder, 2, DAMAGES[kind])
    with caplog.at_level(logging.WARNING), train.open_checkpoints(folder) as checkpoints:
        assert_is(train.restore(checkpoints, LIKE, ABOUT)[0], 1)
        train.save(checkpoints, state_at(2), ABOUT)
    assert "step 2 is damaged" in caplog.text and "step 1" in caplog.text
    assert names(folder) == ["1", "2", "damaged-2"]


def test_if_all_states_are_damaged_restore_raises(folder):
    for step in (1, 2):
        damage(folder, step, DAMAGES["emptied"])
    with pytest.raises(ValueError, match=f"remove {folder}"):
        restored(folder)
    assert names(folder) == ["1", "2"]


def test_a_state_of_another_run_is_refused_with_the_differing_fields(folder):
    other = ABOUT | {"model_width": 32, "no_data_augm": True}
    with pytest.raises(ValueError, match="model_width 16 -> 32, no_data_augm False -> True"):
        restored(folder, about=other)
    assert_is(restored(folder, about=ABOUT | {"a_later_flag": 1}), 2)  # which older runs lack


def test_other_arrays_are_refused_with_name_shape_and_dtype(folder):
    for params, listed in (
        ({"kernel": W[:, :5]}, "kernel float32[64, 64] -> float32[64, 5]"),
        ({"kernel": W.astype(float)}, "kernel float32[64, 64] -> float64[64, 64]"),
        ({"kernels": W}, "kernels missing -> float32[64, 64]"),
    ):
        with pytest.raises(ValueError) as refused:
            restored(folder, LIKE._replace(params={"Dense": LIKE.params["Dense"] | params}))
        assert listed in str(refused.value)


@pytest.mark.parametrize(("path", "step"), [("checkpoints", 2), ("", 2), ("checkpoints/1", 1)])
def test_weights_load_from_a_run_its_states_or_one_state(folder, tmp_path, path, step):
    weights = train.load_weights(tmp_path / path, LIKE.params, LIKE.stats)
    assert_is(state_at(step)._replace(params=weights[0], stats=weights[1]), step)


def test_a_fork_takes_arrays_that_both_have_and_initializes_others(folder):
    """Same network; an optimizer without the trace, and with a buffer that the other lacks."""
    assert_is(train.fork(folder / "1", LIKE), 1)
    other = LIKE._replace(opt_state=({"velocity": W}, {"trace": W[:3]}))
    forked = train.fork(folder, other)
    assert_is(forked._replace(opt_state=state_at(2).opt_state), 2)
    jax.tree.map(np.testing.assert_array_equal, forked.opt_state, other.opt_state)


def test_missing_other_or_damaged_weights_are_refused(folder, tmp_path):
    for path in (tmp_path / "nowhere", folder / "3"):
        with pytest.raises(ValueError, match="no saved state"):
            train.fork(path, LIKE)
    with pytest.raises(ValueError, match="stats/m"):
        train.fork(folder / "1", LIKE._replace(stats={"m": jnp.ones(4)}))
    damage(folder, 2, flipped)
    with pytest.raises(ValueError, match="damaged"):
        train.load_weights(folder, LIKE.params, LIKE.stats)


@pytest.mark.parametrize("room", [0, 2000])
def test_a_failed_save_is_one_error_and_keeps_earlier_states(folder, no_room, room):
    """Once there is space again, the same steps are saved."""
    with pytest.raises(OSError) as failed, no_room(room), train.open_checkpoints(folder) as to:
        train.save(to, state_at(3), ABOUT)
    text = str(failed.value)
    assert str(folder) in text and "step 2" in text and "\n" not in text
    assert_is(restored(folder), 2)
    with train.open_checkpoints(folder) as checkpoints:
        train.save(checkpoints, state_at(3), ABOUT)
    assert_is(restored(folder), 3)


def test_a_failed_first_save_is_an_error_before_training(tmp_path, no_room):
    closed = contextlib.suppress(OSError)  # repeats the error
    with closed, train.open_checkpoints(tmp_path) as to, no_room(0), pytest.raises(OSError):
        train.save(to, state_at(0))


@pytest.mark.parametrize("name", ["mom[0.9]", "a*", "a?", "a\\b", "gs://bucket"])
def test_paths_that_orbax_cannot_read_are_refused(tmp_path, name):
    with pytest.raises(ValueError), train.open_checkpoints(f"{tmp_path}/{name}/checkpoints"):
        pass
    assert names(tmp_path) == []


def test_other_unusual_paths_work(tmp_path):
    folder = tmp_path / "a b\n\tü→日%41#" / "-x~{a,b}$(x)'\""
    with train.open_checkpoints(folder) as checkpoints:
        train.save(checkpoints, state_at(3), ABOUT)
    assert_is(restored(folder), 3)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "int32", "uint8", "bool"])
def test_the_digest_detects_a_flipped_bit_and_a_swap(dtype):
    values = np.asarray([0, 1, 1, 0, 1, 0])
    others = [values[::-1], *(np.where(np.arange(6) == i, 1 - values, values) for i in range(6))]
    of = lambda x: int(digest(LIKE._replace(params={"a": jnp.asarray(x, dtype)})))
    assert len(set(map(of, [values, *others]))) == 1 + len(others)
