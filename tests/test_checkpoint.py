"""What was saved is what comes back, or an error says why: never other numbers in silence."""

import errno
import gc
import logging
import os
import shutil
import threading
import time

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from sgd_sparse_jax import train
from sgd_sparse_jax.train.checkpoint import digest
from sgd_sparse_jax.types import TrainState

# Where one array can't be read, orbax abandons the reads of the others: they complain a bit later
# or when they are collected. The fixture has that happen in the test that is to blame.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ABOUT = {"model": "resnet18_plain", "model_width": 16, "l2_reg": 5e-4, "no_data_augm": False}
W = jr.normal(jr.key(0), (64, 64), jnp.float32)


def state_at(step):
    """Different at every step, in two precisions, with an empty average."""
    params = {"Dense": {"kernel": W + step, "bias": jnp.arange(5.0) + step}}
    trace = ({"trace": W * step},)
    return TrainState(jnp.asarray(step, jnp.int32), params, {"m": jnp.ones(3) * step}, trace, ())


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
            train.save(checkpoints, state_at(step), ABOUT)
    return folder


@pytest.fixture
def folder(original, tmp_path):
    return shutil.copytree(original, tmp_path / "checkpoints")


def restored(folder, like=None, about=ABOUT):
    like = jax.tree.map(jnp.zeros_like, state_at(0)) if like is None else like
    with train.open_checkpoints(folder) as checkpoints:
        return train.restore(checkpoints, like, about)[0]


def assert_is(state, step):
    jax.tree.map(np.testing.assert_array_equal, state, state_at(step))


def array_file(folder, step):
    """Where the numbers themselves are."""
    files = [path for path in (folder / str(step)).rglob("d/*") if path.is_file()]
    return max(files, key=lambda path: path.stat().st_size)


def test_the_newest_state_comes_back(folder):
    assert_is(restored(folder), 2)
    assert train.latest_step(folder) == 2


def test_nothing_saved_is_a_fresh_start(tmp_path):
    assert_is(restored(tmp_path / "new", state_at(0)), 0)
    assert train.latest_step(tmp_path / "absent") is None


def test_what_was_saved_beside_a_state_comes_back_exactly(tmp_path):
    beside = {"loss_sum": 0.1 + 0.2, "steps": 7, "tiny": 5e-324}
    with train.open_checkpoints(tmp_path) as checkpoints:
        assert train.restore(checkpoints, state_at(0), ABOUT)[1] == {}
        train.save(checkpoints, state_at(3), ABOUT, beside)
    with train.open_checkpoints(tmp_path) as checkpoints:
        state, back = train.restore(checkpoints, state_at(0), ABOUT)
    assert_is(state, 3)
    assert back == beside


def test_only_the_newest_are_kept(folder):
    with train.open_checkpoints(folder, keep=2) as checkpoints:
        train.save(checkpoints, state_at(3), ABOUT)
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3"]


def flipped(raw):
    middle = len(raw) // 2
    return raw[:middle] + bytes([raw[middle] ^ 0x10]) + raw[middle + 1 :]


DAMAGES = {
    "emptied": lambda raw: b"",
    "truncated": lambda raw: raw[: len(raw) // 2],
    "one bit flipped": flipped,
    "zeroed": lambda raw: bytes(len(raw)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_numbers_fall_back_and_it_is_said(folder, damage, caplog):
    path = array_file(folder, 2)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    with caplog.at_level(logging.WARNING):
        assert_is(restored(folder), 1)
    assert "The state of step 2 is damaged" in caplog.text and "back to step 1" in caplog.text
    assert sorted(path.name for path in folder.iterdir()) == ["1", "damaged-2"]


@pytest.mark.slow
@pytest.mark.parametrize("damage", [*DAMAGES, "gone"])
def test_no_damage_to_any_file_restores_other_numbers(original, tmp_path, damage):
    files = [path.relative_to(original) for path in (original / "2").rglob("*") if path.is_file()]
    for count, file in enumerate(files):
        folder = shutil.copytree(original, tmp_path / str(count))
        path = folder / file
        if damage == "gone":
            path.unlink()
        else:
            path.write_bytes(DAMAGES[damage](path.read_bytes()))
        try:
            state = restored(folder)
        except ValueError as error:
            assert "move the damaged" in str(error)
        else:
            assert_is(state, int(state.step))


def test_a_damaged_description_falls_back(folder):
    (folder / "2" / "_CHECKPOINT_METADATA").write_text("{")
    assert_is(restored(folder), 1)


def test_descriptions_that_cannot_be_listed_name_the_cure(folder):
    path = folder / "2" / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace("performance_metrics", "performance_metricz"))
    with pytest.raises(
        ValueError, match=r"can't be listed .*metricz.*move the damaged step.*, 2, out"
    ):
        restored(folder)


def test_a_step_whose_state_was_damaged_can_be_saved_and_damaged_again(folder):
    for names in (["1", "2", "damaged-2"], ["1", "2", "damaged-2", "damaged-2-1"]):
        array_file(folder, 2).write_bytes(b"")
        with train.open_checkpoints(folder) as checkpoints:  # as one run: restore, then save
            assert_is(train.restore(checkpoints, state_at(0), ABOUT)[0], 1)
            train.save(checkpoints, state_at(2), ABOUT)
        assert sorted(path.name for path in folder.iterdir()) == names
    assert_is(restored(folder), 2)


def test_states_that_are_all_damaged_are_no_fresh_start(folder):
    for step in (1, 2):
        array_file(folder, step).write_bytes(b"")
    with pytest.raises(ValueError, match=r"No state under .* can be read \(steps \[2, 1\]"):
        restored(folder)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]  # nothing is touched


def test_another_runs_state_is_refused_field_by_field(folder):
    words = r"step 2 is another run's \(model_width 16 -> 32, no_data_augm False -> True\)"
    with pytest.raises(ValueError, match=words):
        restored(folder, about=ABOUT | {"model_width": 32, "no_data_augm": True})
    assert_is(restored(folder, about=ABOUT | {"a_later_flag": 1}), 2)  # as old runs lack it
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_other_shapes_and_precisions_are_refused(folder):
    like = state_at(0)
    dense = like.params["Dense"]
    with pytest.raises(
        ValueError,
        match=r"params/Dense/kernel is float32\[64, 64\] there and float32\[64, 5\] here \(1 of",
    ):
        restored(folder, like._replace(params={"Dense": dense | {"kernel": W[:, :5]}}))
    double = {"Dense": dense | {"kernel": W.astype(jnp.float64)}}
    with pytest.raises(ValueError, match=r"float32.* there and .*float64"):
        restored(folder, like._replace(params=double))


def test_another_network_is_told_field_by_field(folder):
    like = state_at(0)
    other = {f"Conv_{i}": {"kernel": W} for i in range(4)}
    with pytest.raises(ValueError, match="is another network's") as error:
        restored(folder, like._replace(params=other, stats={}))
    text = str(error.value)
    assert "params/Conv_0/kernel is missing there and float32[64, 64] here" in text
    assert "params/Dense/bias is float64[5] there and missing here" in text
    assert "; 2 more (7 of 9 arrays differ)" in text


@pytest.mark.parametrize("where", ["", "run", "step"])
def test_weights_are_found_from_the_run_its_states_or_one_of_them(folder, tmp_path, where):
    path = {"": folder, "run": tmp_path, "step": folder / "1"}[where]
    like = jax.tree.map(jnp.zeros_like, state_at(0))
    params, stats = train.load_weights(path, like.params, like.stats)
    want = state_at(1 if where == "step" else 2)
    jax.tree.map(np.testing.assert_array_equal, (params, stats), (want.params, want.stats))


def test_weights_of_another_network_or_of_nothing_are_refused(folder, tmp_path):
    like = state_at(0)
    with pytest.raises(ValueError, match=r"stats/m is float64.3. there and missing here"):
        train.load_weights(folder, like.params, {})
    with pytest.raises(ValueError, match="holds no saved state: give a run's folder"):
        train.load_weights(tmp_path / "nowhere", like.params, like.stats)


@pytest.mark.parametrize("what", ["number", "file"])
def test_damaged_weights_are_refused(folder, what):
    chunks = [path for path in (folder / "2").rglob("d/*") if path.is_file()]
    for path in chunks:
        content = bytearray(path.read_bytes())
        if what == "file":
            path.write_bytes(content[: len(content) // 2])
        else:
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
    assert chunks
    like = state_at(0)
    with pytest.raises(
        ValueError, match=r"step 2: (the state is damaged|no state that can be read)"
    ):
        train.load_weights(folder, like.params, like.stats)


@pytest.mark.parametrize("step", [1, 2])
def test_a_step_is_not_saved_twice_in_silence(folder, step):
    with (
        train.open_checkpoints(folder) as checkpoints,
        pytest.raises(ValueError, match=rf"Step {step} isn't newer than .*step 2"),
    ):
        train.save(checkpoints, state_at(step), ABOUT)


def test_a_save_that_fails_in_the_background_is_heard_of(folder, monkeypatch):
    from orbax.checkpoint._src.handlers import pytree_checkpoint_handler

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    handler = pytree_checkpoint_handler.PyTreeCheckpointHandler
    monkeypatch.setattr(handler, "finalize", full)
    with pytest.raises(OSError, match="No space"), train.open_checkpoints(folder) as checkpoints:
        train.save(checkpoints, state_at(3), ABOUT)
    assert train.latest_step(folder) == 2


def test_a_save_without_room_is_an_error_of_the_disk_without_tracebacks(
    folder, monkeypatch, caplog
):
    """TensorStore has its name in the text of a ValueError; orbax logs it, three times over."""
    from orbax.checkpoint._src.handlers import pytree_checkpoint_handler

    def full(*args, **kwargs):
        raise ValueError("RESOURCE_EXHAUSTED: Failed to write 177 bytes: No space left on device")

    monkeypatch.setattr(pytree_checkpoint_handler.PyTreeCheckpointHandler, "finalize", full)
    with pytest.raises(OSError, match="No space left") as no, train.open_checkpoints(folder) as to:
        train.save(to, state_at(3), ABOUT)
    assert no.value.errno == errno.ENOSPC and no.value.filename == str(folder)
    assert not [record for record in caplog.records if record.exc_info]


def test_a_save_that_cannot_make_its_folder_leaves_no_thread_behind(folder, monkeypatch):
    """Python waits at its end for those that it hasn't been told to leave."""

    def read_only(path, *args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system", os.fspath(path))

    before = set(threading.enumerate())
    with pytest.raises(OSError, match="Read-only"), train.open_checkpoints(folder) as checkpoints:
        monkeypatch.setattr(os, "mkdir", read_only)
        train.save(checkpoints, state_at(3))
    keeping = [each for each in set(threading.enumerate()) - before if not each.daemon]
    for thread in keeping:
        thread.join(1)
    assert not [each.name for each in keeping if each.is_alive()]


def test_what_a_cut_save_left_goes_with_the_next_start_but_not_with_a_reader(folder):
    cut = folder / "3.orbax-checkpoint-tmp"
    (cut / "default.orbax-checkpoint-tmp").mkdir(parents=True)
    like = state_at(0)
    train.load_weights(folder, like.params, like.stats)
    assert cut.is_dir()
    assert_is(restored(folder), 2)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


@pytest.mark.parametrize("damage", DAMAGES)
def test_what_stands_beside_a_damaged_state_is_nothing(folder, damage):
    with train.open_checkpoints(folder) as checkpoints:
        train.save(checkpoints, state_at(3), ABOUT, {"rows": [2, "{}"]})
    assert train.progress_of(folder, 3) == {"rows": [2, "{}"]}
    path = array_file(folder, 3)
    path.write_bytes(DAMAGES[damage](path.read_bytes()))
    assert train.progress_of(folder, 3) is None


def test_a_disk_without_room_is_told_before_anything_is_written(folder, monkeypatch):
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state_at(3)))
    before = sorted(folder.rglob("*"))
    usage = shutil.disk_usage(folder)
    with train.open_checkpoints(folder) as checkpoints:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size))
        with pytest.raises(
            OSError, match=r"takes 1.0 MiB, 0.0 are free; what is saved stays"
        ) as no:
            train.save(checkpoints, state_at(3), ABOUT)
        assert no.value.errno == errno.ENOSPC and no.value.filename == str(folder)
        assert sorted(folder.rglob("*")) == before
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=size + 2**20))
        train.save(checkpoints, state_at(3), ABOUT)
    assert train.latest_step(folder) == 3


@pytest.mark.parametrize(("before", "after"), [(1, 8), (8, 2), (2, 1)])
def test_a_state_moves_between_device_counts(tmp_path, before, after):
    on = lambda devices, state: train.replicate(state, train.data_mesh(jax.devices()[:devices]))
    with train.open_checkpoints(tmp_path) as checkpoints:
        train.save(checkpoints, on(before, state_at(4)), ABOUT)
    moved = restored(tmp_path, on(after, state_at(0)))
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(moved)} == {after}
    assert_is(moved, 4)


@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16", "int32", "uint8", "bool"])
def test_the_digest_sees_one_bit_and_one_exchange(dtype):
    values = np.asarray([0, 1, 1, 0, 1, 0])
    others = [values[::-1], *(np.where(np.arange(6) == i, 1 - values, values) for i in range(6))]

    def of(values):
        x = jnp.asarray(values, dtype)
        return int(digest(TrainState(jnp.zeros((), jnp.int32), {"a": x, "b": x[:2]}, {}, (), ())))

    assert of(values) == of(values.copy())
    assert len({of(values), *map(of, others)}) == 1 + len(others)


def test_a_fork_takes_what_both_have_and_begins_the_rest(folder, tmp_path):
    """Here: the same network; an optimizer without the trace, with a buffer the other lacks."""
    like = jax.tree.map(jnp.zeros_like, state_at(0))
    same = train.fork(tmp_path, 1, like)
    assert_is(same, 1)
    other = like._replace(opt_state=({"velocity": W}, {"trace": W[:3]}))
    forked = train.fork(tmp_path, 2, other)
    assert_is(forked._replace(opt_state=state_at(2).opt_state), 2)
    jax.tree.map(np.testing.assert_array_equal, forked.opt_state, other.opt_state)


def test_a_fork_of_what_is_not_there_is_refused(folder, tmp_path):
    like = state_at(0)
    with pytest.raises(ValueError, match=r"no state of step 3; it has those of steps 1, 2\. A run"):
        train.fork(tmp_path, 3, like)
    with pytest.raises(ValueError, match=r"no state of step 3; it has those of steps \(none\)"):
        train.fork(tmp_path / "nowhere", 3, like)
    wider = like._replace(stats={"m": jnp.ones(4)})
    with pytest.raises(ValueError, match=r"stats/m is float64.3. there and float64.4. here"):
        train.fork(tmp_path, 2, wider)
    array_file(folder, 2).write_bytes(b"")
    with pytest.raises(ValueError, match="step 2: the state is damaged"):
        train.fork(tmp_path, 2, like)
