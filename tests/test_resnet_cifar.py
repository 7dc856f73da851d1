"""The command at small size: stopped, continued, forked, refused."""

import json
import os
import shutil
import signal
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from experiments import resnet_cifar
from experiments.deep import setup, training, workbench
from experiments.deep.config import Config, folder_of
from experiments.launch import cli
from experiments.launch.signals import Stopped
from experiments.storage import records

NUM_STEPS = 5
pytestmark = [
    pytest.mark.usefixtures("shallow", "unrendered", "single_precision"),
    # If one array of a state can't be read, orbax abandons the others, which raise later.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def base(small_cifar):
    """Evaluation sizes are the defaults, which exceed the data."""
    flags = (
        "--model=shallow --model_width=2 --batch_size=16 --epochs=4 --max_steps=5 --lr_init=0.05 "
        f"--lr_schedule=constant --eval_iter_freq=3 --deterministic --data_dir={small_cifar}"
    )
    return cli.parse(Config, flags.split())


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    """Flags and folder of an uninterrupted run, in a folder with an unusual name."""
    odd = tmp_path_factory.mktemp("runs") / "-a b\n~ü%41#{x,y}"
    with jax.enable_x64(False):
        config = replace(base, runs_dir=str(odd), exp_name="50% ~ü")
        return config, resnet_cifar.run(config)


run = training.run  # without figures


def saved_state(folder, step=NUM_STEPS):
    import orbax.checkpoint as ocp

    return ocp.StandardCheckpointer().restore(folder / str(step) / "default")


def assert_same_state(folder, whole):
    both = [saved_state(path / "checkpoints") for path in (folder, whole[1])]
    jax.tree.map(np.testing.assert_array_equal, *both)


def assert_same_run(folder, whole):
    """States bit for bit, metrics byte for byte."""
    assert_same_state(folder, whole)
    metrics = [path / "metrics.jsonl" for path in (folder, whole[1])]
    assert metrics[0].read_bytes() == metrics[1].read_bytes()


def saved_steps(folder):
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def from_steps(folder):
    return [start["from_step"] for start in records.read_starts(folder)]


def steps_of(folder):
    return [row["step"] for row in records.read_records(folder)]


def test_the_run_folder_has_all_files(whole):
    _, folder = whole
    rows = records.read_records(folder)
    assert [(row["step"], row["epoch"]) for row in rows] == [(0, 0), (3, 0.75), (5, 1.25)]
    for row in rows:
        assert row["lr"] == pytest.approx(0.05) and 0 <= row["test/error"] <= 1
        for block in ("block1", "block2"):
            assert 0 <= row[f"train/distinct/{block}"] <= 1 and row[f"train/active/{block}"] > 0
    assert {path.suffix for path in (folder / "figures").iterdir()} == {".png", ".pdf"}
    assert json.loads((folder / "config.json").read_text())["lr_init"] == 0.05
    (start,) = records.read_starts(folder)
    assert start["from_step"] == 0 and start["steps"] == NUM_STEPS and "finished" in start
    assert saved_steps(folder / "checkpoints") == [3, 5]


def test_a_finished_run_is_not_trained_again(whole, capsys):
    config, folder = whole
    before = {path: path.stat().st_mtime_ns for path in folder.glob("m*.json*")}
    assert run(config) == run(replace(config, max_steps=2)) == folder
    assert capsys.readouterr().out.count("already at step 5") == 2
    assert before == {path: path.stat().st_mtime_ns for path in folder.glob("m*.json*")}


def test_a_killed_and_resumed_run_equals_an_uninterrupted_one(whole, base, tmp_path, caplog):
    """Killed after the save at step 3, with its record torn, or after a record without a save."""
    config = replace(base, runs_dir=str(tmp_path))
    folder = run(replace(config, max_steps=3))
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    manifest = folder / "manifest.json"
    manifest.write_text(manifest.read_text().replace(f'"jax": "{jax.__version__}"', '"jax": "0"'))
    run(replace(config, max_steps=4))
    assert [line for line in caplog.messages if "jax was 0" in line]
    records.append_record(folder, {"step": 5, "left": "by a process that did not save"})
    shutil.rmtree(folder / "checkpoints" / "4")
    run(config)
    assert_same_run(folder, whole)
    assert from_steps(folder) == [0, 3, 3]


def test_signals_stop_at_the_next_step_and_lose_nothing(whole, base, tmp_path, monkeypatch):
    """Sent while a record is written; the saved state is that of the next step."""
    config, append = replace(base, runs_dir=str(tmp_path)), records.append_record
    for number, step in ((signal.SIGTERM, 0), (signal.SIGUSR1, 3)):

        def and_a_signal(folder, row, number=number, step=step):
            append(folder, row)
            if row["step"] == step:
                os.kill(os.getpid(), number)

        monkeypatch.setattr(records, "append_record", and_a_signal)
        before = signal.getsignal(number)
        with pytest.raises(Stopped) as stop:
            run(config)
        assert signal.getsignal(number) == before
        assert number.name in str(stop.value) and f"step {step + 1} " in str(stop.value)
    monkeypatch.undo()
    folder = run(config)
    assert_same_run(folder, whole)
    assert from_steps(folder) == [0, 1, 4]


def test_a_damaged_newest_state_is_skipped_and_computed_again(whole, tmp_path, caplog):
    config, folder = whole
    copy = shutil.copytree(folder, tmp_path / "resnet_cifar" / folder.name)
    for path in (copy / "checkpoints" / str(NUM_STEPS)).rglob("d/*"):
        path.write_bytes(b"")
    run(replace(config, runs_dir=str(tmp_path)))
    assert f"step {NUM_STEPS} is damaged" in caplog.text and "step 3" in caplog.text
    assert_same_run(copy, whole)
    assert (copy / "checkpoints" / f"damaged-{NUM_STEPS}").is_dir()


def test_neither_saves_nor_repetition_change_a_byte(whole, base, tmp_path):
    folder = run(replace(base, runs_dir=str(tmp_path), save_every_seconds=0, keep=9))
    assert_same_run(folder, whole)
    assert saved_steps(folder / "checkpoints") == [0, 1, 2, 3, 4, 5]


def test_a_fork_without_changes_equals_its_parent(whole, base, tmp_path):
    parent = shutil.copytree(whole[1], tmp_path / "parent")
    fork = replace(base, runs_dir=str(tmp_path), fork_from=str(parent), fork_step=3, max_steps=4)
    folder = run(fork)
    shutil.rmtree(parent)
    run(replace(fork, max_steps=NUM_STEPS))
    assert_same_state(folder, whole)
    assert steps_of(folder) == [3, 4, 5]


def test_a_fork_continues_with_other_settings(whole, base, tmp_path):
    """With another step size and batch size."""
    parent = whole[1]
    changes = {"lr_init": 0.02, "batch_size": 32, "max_steps": 6}
    fork = replace(base, runs_dir=str(tmp_path), fork_from=str(parent), fork_step=3, **changes)
    folder = run(fork)
    assert folder.name.endswith("lr0.02-constant-seed0-fork3")
    rows = records.read_records(folder)
    assert [row["step"] for row in rows] == [3, 6] and rows[0]["epoch"] == 1.5
    at_fork = records.read_records(parent)[1]
    for name in ("train/loss", "test/loss", "test_average/error", "param_norm"):
        np.testing.assert_allclose(rows[0][name], at_fork[name], rtol=1e-6)
    (start,) = records.read_starts(folder)
    changed = {"lr_init": [0.05, 0.02], "batch_size": [16, 32]}
    assert start["parent"] == {"run": str(parent), "step": 3, "changed": changed}


def test_diverged_training_stops_and_keeps_finite_states(base, tmp_path):
    """The same command again fails in the same way, and writes no record twice."""
    config = replace(base, lr_init=3e38, runs_dir=str(tmp_path))
    for _ in range(2):
        with pytest.raises(FloatingPointError, match="--lr_init") as stop:
            run(config)
        folder = folder_of(config)
        assert str(folder) in str(stop.value)
        assert steps_of(folder) == [0] and saved_steps(folder / "checkpoints") == [0]


def test_a_run_continues_only_with_equal_settings_and_data(whole, tmp_path):
    config, folder = whole
    other = shutil.copytree(config.data_dir, tmp_path / "data") / "cifar10" / "train_labels.npy"
    np.save(other, np.load(other)[::-1])
    before = (folder / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"momentum 0\.9 -> 0\.5"):
        run(replace(config, momentum=0.5))
    with pytest.raises(ValueError, match="train data, labels"):
        run(replace(config, data_dir=str(tmp_path / "data"), max_steps=6))
    assert (folder / "config.json").read_bytes() == before


@pytest.fixture(scope="module")
def switched(base, tmp_path_factory):
    """A run with the other switches of the released code, in bfloat16, with all states saved."""
    runs_dir = str(tmp_path_factory.mktemp("switched"))
    config = replace(base, deterministic=False, epochs=2, max_steps=0, runs_dir=runs_dir)
    noise = {"p_label_noise": 0.25, "sgd_p_label_noise": 0.5, "ln_schedule": "inverted_cosine"}
    sizes = {"frac_train": 0.75, "n_final_eval": 20, "jacobian_examples": 2, "eval_iter_freq": -1}
    config = replace(config, half_prec=True, save_model_each_k_epochs=1, **noise, **sizes)
    with jax.enable_x64(False):
        return config, run(config)


def test_the_switches_of_the_released_code_run_together(switched):
    """48 images, 16 at a time; an evaluation every fifth epoch."""
    _, folder = switched
    rows = records.read_records(folder)
    assert [row["epoch"] for row in rows] == [0, 2]
    for row in rows:
        assert 1 <= row["jacobian_rank"] <= 20 and row["param_norm"] > 0 < row["grad_norm"]
        assert row["test/error"] * 20 == pytest.approx(round(row["test/error"] * 20))
    assert all(row["images_per_second"] > 0 < row["window_loss"] for row in rows[1:])
    assert saved_steps(folder / "models") == [3, 6]


@pytest.mark.parametrize("state", ["models/3", ""])
def test_a_run_may_start_from_the_weights_of_another(switched, state, tmp_path):
    config, folder = switched
    chosen = replace(config, model_path=str(folder / state), runs_dir=str(tmp_path))
    plan = setup.resolve(chosen)
    begins = workbench.of(plan).initial_state(plan.init_key, plan.weights)
    saved = saved_state(*(folder / "models", 3) if state else (folder / "checkpoints", 6))
    actual = {"params": begins.params, "average": begins.average, "stats": begins.stats}
    expected = {"params": saved["params"], "average": saved["params"], "stats": saved["stats"]}
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert int(begins.step) == 0
    with pytest.raises(ValueError, match="--model_path"):
        run(replace(chosen, model_width=4))
    assert list(tmp_path.iterdir()) == []


def test_shares_and_wrong_labels_are_of_the_training_set_alone(base):
    plain = setup.resolve(base)
    noisy = setup.resolve(replace(base, p_label_noise=0.5, frac_train=0.29, n_final_eval=7))
    assert len(noisy.images.labels) == len(noisy.images.images) == 18
    np.testing.assert_array_equal(noisy.images.images, plain.images.images[:18])
    assert (noisy.images.labels != plain.images.labels[:18]).sum() == 9
    np.testing.assert_array_equal(noisy.test_images.labels, plain.test_images.labels[:7])
    assert len(setup.resolve(replace(base, n_final_eval=-1)).test_images.labels) == 64
    asym = setup.resolve(replace(base, p_label_noise=1.0, noise_type="asym"))
    swapped = np.array([0, 1, 0, 5, 7, 3, 6, 7, 8, 1])
    np.testing.assert_array_equal(asym.images.labels, swapped[plain.images.labels])


@pytest.mark.parametrize(
    ("dataset", "flips"), [("cifar10", True), ("svhn", False), ("cifar10_dog_cat_gs", True)]
)
def test_augmentation_is_the_released_codes(dataset, flips):
    augment = setup.augmentation(Config(dataset=dataset))
    ramp = np.tile(np.arange(100, 132, dtype=np.uint8)[:, None], (64, 32, 1, 1))
    rising = np.asarray(augment(jax.random.key(0), ramp))[:, 16, 8:24, 0].astype(int)
    assert (np.diff(rising, axis=1) < 0).any() == flips
    for without in (Config(dataset="mnist"), Config(dataset=dataset, no_data_augm=True)):
        assert setup.augmentation(without) is None


WRONG = [
    ({"lr_schedule": "piecewise_04epochs"}, "--lr_schedule"),
    ({"ln_schedule": "piecewise_2_3_3"}, "--ln_schedule"),
    ({"model": "vgg16", "droprate": 0.1}, "--model.*dropout"),
    ({"batch_size": 12}, "--batch_size"),
    ({"batch_size": 72}, "--batch_size"),
    ({"exp_name": "a[0]"}, "--exp_name"),
    ({"frac_train": 0.001}, "--frac_train"),
    ({"bn_images": 7}, "--bn_images"),
    ({"dataset": "mnist", "noise_type": "asym", "p_label_noise": 0.1}, "--noise_type"),
    ({"fork_from": "run"}, "--fork_step"),
    ({"fork_from": "run", "fork_step": 3}, "--fork_from"),
    ({"fork_from": "a[0]", "fork_step": 3}, "--fork_from"),
    ({"fork_from": "a", "fork_step": 1, "model_path": "b"}, "--model_path"),
    ({"model_path": "nowhere"}, "--model_path"),
]


@pytest.mark.parametrize(("wrong", "named"), WRONG)
def test_invalid_settings_are_refused_before_anything_is_written(base, wrong, named, tmp_path):
    """The error is one line that names the flag or its value."""
    with pytest.raises(ValueError, match=named) as refused:
        run(replace(base, **{"runs_dir": str(tmp_path)} | wrong))
    assert "\n" not in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_the_penalty_is_inside_the_momentum():
    """Coupled L2: two steps of zero gradient still build up velocity from the weights alone."""
    tx = setup.optimizer(lambda step: 0.5, momentum=0.9, l2_reg=0.1)
    p, state = jnp.ones(()), tx.init(jnp.ones(()))
    for _ in range(2):
        update, state = tx.update(jnp.zeros(()), state, p)
        p = optax.apply_updates(p, update)
    velocity = 0.9 * 0.1 + 0.1 * 0.95
    np.testing.assert_allclose(p, 0.95 - 0.5 * velocity, rtol=1e-6)
