"""The command as its user runs it, in small: a data set of 64 images in the cache's layout."""

import gc
import json
import os
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import resnet_cifar
from experiments.deep import config as deep_flags, setup as deep_parts
from experiments.launch.signals import Stopped
from experiments.resnet_cifar import Config
from experiments.storage import records
from sgd_sparse_jax import data, train

NUM_STEPS = 5
pytestmark = pytest.mark.usefixtures("shallow", "compiled_once", "single_precision")


@pytest.fixture(scope="module")
def base(small_cifar):
    return Config(
        model="shallow",
        model_width=2,
        batch_size=16,
        batch_size_eval=32,
        epochs=4,
        max_steps=NUM_STEPS,
        eval_iter_freq=3,
        lr_init=0.05,
        lr_schedule="constant",
        sparsity_images=40,
        bn_images=32,
        data_dir=small_cifar,
    )


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory):
    with jax.enable_x64(False):
        config = replace(base, runs_dir=str(tmp_path_factory.mktemp("runs")))
        return config, resnet_cifar.run(config)


def saved_state(folder: Path, step: int):
    import orbax.checkpoint as ocp

    return ocp.StandardCheckpointer().restore(folder / "checkpoints" / str(step) / "default")


def test_the_run_folder_holds_everything(whole):
    _, folder = whole
    rows = records.read_rows(folder)
    assert [row["step"] for row in rows] == [0, 3, 5]
    assert [row["epoch"] for row in rows] == [0, 0.75, 1.25]
    for row in rows:
        assert row["lr"] == pytest.approx(0.05) and 0 <= row["test/error"] <= 1
        for block in (1, 2):
            distinct, active = (
                row[f"train/distinct/block{block}"],
                row[f"train/active/block{block}"],
            )
            assert 0 <= distinct <= 1 and 0 < active <= 1
    assert {path.suffix for path in (folder / "figures").iterdir()} == {".png", ".pdf"}
    assert json.loads((folder / "config.json").read_text())["lr_init"] == 0.05
    (start,) = records.read_json(folder / "manifest.json")["starts"]
    assert start["from_step"] == 0 and start["steps"] == NUM_STEPS and "finished" in start


def test_a_run_cut_and_resumed_is_the_same_run(whole, base, tmp_path):
    config = replace(base, runs_dir=str(tmp_path))
    folder = resnet_cifar.run(replace(config, max_steps=3))
    records.append_row(folder, {"step": 4, "left": "by a run that was killed before it saved"})
    resnet_cifar.run(config)
    jax.tree.map(
        np.testing.assert_array_equal,
        saved_state(folder, NUM_STEPS),
        saved_state(whole[1], NUM_STEPS),
    )
    # and the row that no saved state covers is gone:
    assert untimed_rows(folder) == untimed_rows(whole[1])
    starts = records.read_json(folder / "manifest.json")["starts"]
    assert [start["from_step"] for start in starts] == [0, 3]


TIMED = ("eval_seconds", "step_seconds", "images_per_second")


def untimed_rows(folder):
    return [{k: v for k, v in row.items() if k not in TIMED} for row in records.read_rows(folder)]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_stops_at_the_next_step_and_nothing_is_lost(
    whole, base, tmp_path, monkeypatch, number
):
    """Sent while the row of step 3 is written: the state of step 4, between rows, is saved."""
    config = replace(base, runs_dir=str(tmp_path))
    append = records.append_row

    def and_a_signal(folder, row):
        append(folder, row)
        if row["step"] == 3:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    monkeypatch.setattr(records, "append_row", and_a_signal)
    with pytest.raises(Stopped, match=rf"{number.name}: stopped at step 4 of 5; {tmp_path}.* goes"):
        resnet_cifar.run(config)
    assert signal.getsignal(number) == before
    monkeypatch.undo()
    folder = resnet_cifar.run(config)
    jax.tree.map(
        np.testing.assert_array_equal,
        saved_state(folder, NUM_STEPS),
        saved_state(whole[1], NUM_STEPS),
    )
    assert untimed_rows(folder) == untimed_rows(whole[1])
    starts = records.read_json(folder / "manifest.json")["starts"]
    assert [start["from_step"] for start in starts] == [0, 4]


@pytest.mark.parametrize("steps", [3, NUM_STEPS])
def test_a_row_that_was_cut_is_put_back(whole, base, tmp_path, steps, caplog):
    """The state of its step is saved, so no later step would write it again."""
    config = replace(base, runs_dir=str(tmp_path))
    folder = resnet_cifar.run(replace(config, max_steps=steps))
    path = folder / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-20])
    resnet_cifar.run(config)
    assert untimed_rows(folder) == untimed_rows(whole[1])
    assert f"had lost the row of step {steps}" in caplog.text


# Where one array can't be read, orbax abandons the reads of the others, which complain later.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_finished_run_whose_state_was_damaged_goes_back_and_on(whole, tmp_path, caplog):
    config, folder = whole
    copy = shutil.copytree(folder, tmp_path / "resnet_cifar" / folder.name)
    for path in (copy / "checkpoints" / str(NUM_STEPS)).rglob("d/*"):
        path.write_bytes(b"")
    resnet_cifar.run(replace(config, runs_dir=str(tmp_path)))
    assert f"state of step {NUM_STEPS} is damaged" in caplog.text
    assert "going back to step 3" in caplog.text
    jax.tree.map(
        np.testing.assert_array_equal, saved_state(copy, NUM_STEPS), saved_state(folder, NUM_STEPS)
    )
    assert untimed_rows(copy) == untimed_rows(folder)
    time.sleep(0.1)
    gc.collect()


def test_two_runs_of_one_command_give_the_same_bytes(whole, base, tmp_path):
    """However often the states are saved, and however many of them are kept."""
    once = replace(base, runs_dir=str(tmp_path / "a"), deterministic=True)
    often = replace(once, runs_dir=str(tmp_path / "b"), save_every_seconds=0, keep=9)
    one, two = resnet_cifar.run(once), resnet_cifar.run(often)
    assert (one / "metrics.jsonl").read_bytes() == (two / "metrics.jsonl").read_bytes()
    assert records.read_rows(one) == untimed_rows(whole[1])
    states = lambda folder: {p.name for p in (folder / "checkpoints").iterdir() if p.name.isdigit()}
    assert states(one) == {"3", "5"} and states(two) == {"1", "2", "3", "4", "5"}


def test_a_fork_goes_on_from_another_runs_state_with_other_settings(whole, base, tmp_path):
    """With no momentum before and some after, and another batch size."""
    parent = whole[1]
    fork = replace(
        base,
        runs_dir=str(tmp_path),
        fork_from=str(parent),
        fork_step=3,
        lr_init=0.02,
        batch_size=32,
        max_steps=6,
    )
    folder = resnet_cifar.run(fork)
    assert folder.name.endswith("lr0.02-constant-seed0-fork3")
    rows = records.read_rows(folder)
    assert [row["step"] for row in rows] == [3, 6] and rows[0]["epoch"] == 1.5
    at_fork = next(row for row in untimed_rows(parent) if row["step"] == 3)
    for name in ("train/loss", "test/loss", "test_average/error", "param_norm"):
        np.testing.assert_allclose(rows[0][name], at_fork[name], rtol=1e-6)
    (start,) = records.read_json(folder / "manifest.json")["starts"]
    changed = start["parent"]["changed"]
    assert start["parent"]["run"] == str(parent) and start["parent"]["step"] == 3
    assert changed["lr_init"] == [0.05, 0.02] and changed["batch_size"] == [16, 32]
    before = (folder / "metrics.jsonl").read_bytes()
    resnet_cifar.run(replace(fork, fork_from=str(parent)))  # finished: nothing is written
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_fork_without_changes_is_the_run_it_came_from(whole, base, tmp_path):
    fork = replace(base, runs_dir=str(tmp_path), fork_from=str(whole[1]), fork_step=3)
    folder = resnet_cifar.run(fork)
    jax.tree.map(
        np.testing.assert_array_equal,
        saved_state(folder, NUM_STEPS),
        saved_state(whole[1], NUM_STEPS),
    )
    assert untimed_rows(folder)[1:] == untimed_rows(whole[1])[2:]


def test_a_fork_goes_on_when_its_parent_is_gone(whole, base, tmp_path):
    parent = shutil.copytree(whole[1], tmp_path / "parent")
    fork = replace(base, runs_dir=str(tmp_path), fork_from=str(parent), fork_step=3, max_steps=4)
    folder = resnet_cifar.run(fork)
    shutil.rmtree(parent)
    resnet_cifar.run(replace(fork, max_steps=5))
    assert [row["step"] for row in records.read_rows(folder)] == [3, 4, 5]


def test_a_finished_run_is_only_drawn_again(whole, capsys):
    config, folder = whole
    before = (folder / "metrics.jsonl").read_bytes()
    resnet_cifar.run(config)
    assert "is at its last step, 5, already" in capsys.readouterr().out
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_max_steps_behind_the_saved_step_is_refused(whole):
    config, folder = whole
    before = (folder / "config.json").read_bytes()
    with pytest.raises(ValueError, match=r"--max_steps is 2, but .* is at step 5 already"):
        resnet_cifar.run(replace(config, max_steps=2))
    assert (folder / "config.json").read_bytes() == before


def test_other_settings_under_the_same_name_are_refused(whole):
    with pytest.raises(ValueError, match=r"momentum 0.9 -> 0.5"):
        resnet_cifar.run(replace(whole[0], momentum=0.5))


def test_a_loss_that_is_not_finite_stops_and_keeps_what_was_good(base, tmp_path):
    config = replace(base, lr_init=3e38, runs_dir=str(tmp_path))
    with pytest.raises(FloatingPointError, match=r"lower the step size.*--lr_init is 3e\+38"):
        resnet_cifar.run(config)
    (folder,) = (tmp_path / "resnet_cifar").iterdir()
    assert [row["step"] for row in records.read_rows(folder)] == [0]
    assert list((folder / "checkpoints").iterdir()) == []
    with pytest.raises(FloatingPointError, match="lower the step size"):
        resnet_cifar.run(config)  # the same command again: the same story, no row twice
    assert [row["step"] for row in records.read_rows(folder)] == [0]


def test_a_saved_state_of_other_settings_is_refused_by_name(whole, tmp_path):
    config, folder = whole
    other = replace(config, batch_size=32, runs_dir=str(tmp_path), max_steps=6)
    place = tmp_path / "resnet_cifar" / folder.name
    shutil.copytree(folder / "checkpoints", place / "checkpoints")
    with pytest.raises(ValueError, match=r"step 5 is another run's \(batch_size 16 -> 32\)"):
        resnet_cifar.run(other)


def test_a_finished_run_without_rows_says_so(whole, tmp_path):
    config, folder = whole
    shutil.copytree(folder, tmp_path / "resnet_cifar" / folder.name)
    (tmp_path / "resnet_cifar" / folder.name / "metrics.jsonl").unlink()
    with pytest.raises(ValueError, match=r"has lost 3 rows of its metrics.jsonl; remove that"):
        resnet_cifar.run(replace(config, runs_dir=str(tmp_path)))


@pytest.fixture(scope="module")
def switched(base, tmp_path_factory):
    """A run with the released code's other switches on, in bfloat16, with its states kept."""
    pytest.importorskip("tensorboardX")
    config = replace(
        base,
        half_prec=True,
        frac_train=0.75,
        p_label_noise=0.25,
        sgd_p_label_noise=0.5,
        ln_schedule="inverted_cosine",
        n_final_eval=20,
        jacobian_examples=2,
        save_model_each_k_epochs=1,
        tensorboard=True,
        epochs=2,
        max_steps=0,
        runs_dir=str(tmp_path_factory.mktemp("switched")),
    )
    with jax.enable_x64(False):
        return config, resnet_cifar.run(config)


def test_the_switches_of_the_released_code_run_together(switched):
    _, folder = switched
    rows = records.read_rows(folder)
    assert [row["epoch"] for row in rows] == [0, 1, 2]  # 48 images, 16 at a time
    for row in rows:
        assert 1 <= row["jacobian_rank"] <= 20 and row["param_norm"] > 0 < row["grad_norm"]
        assert row["test/error"] * 20 == pytest.approx(round(row["test/error"] * 20))
        assert 0 <= row["train/dead/block2"] < 1
    assert all(row["images_per_second"] > 0 < row["window_loss"] for row in rows[1:])
    assert list((folder / "tensorboard").iterdir())
    assert {path.name for path in (folder / "models").iterdir() if path.name.isdigit()} == {
        "3",
        "6",
    }


@pytest.mark.parametrize("state", ["models/3", "checkpoints/6", ""])
def test_a_run_may_start_from_the_weights_of_another(switched, state, tmp_path):
    config, folder = switched
    chosen = replace(
        config, model_path=str(folder / state), runs_dir=str(tmp_path), exp_name="more", max_steps=1
    )
    parts = deep_parts.assemble(chosen)
    step = 3 if state == "models/3" else 6
    where = "models" if state == "models/3" else "checkpoints"
    import orbax.checkpoint as ocp

    saved = ocp.StandardCheckpointer().restore(folder / where / str(step) / "default")
    jax.tree.map(np.testing.assert_array_equal, parts.weights[0], saved["params"])
    mesh = train.data_mesh()
    pixels = deep_parts.placed(parts.images, mesh)
    fresh = deep_parts.training(chosen, parts, mesh, pixels)[2]
    state = fresh(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, state.params, saved["params"])
    jax.tree.map(np.testing.assert_array_equal, state.average, saved["params"])
    jax.tree.map(np.testing.assert_array_equal, state.stats, saved["stats"])
    assert int(state.step) == 0


def test_weights_of_another_width_are_refused_by_name(switched, tmp_path):
    config, folder = switched
    other = replace(config, model_path=str(folder), model_width=4, runs_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"--model_path: .* is another network's: params/BasicBl"):
        resnet_cifar.run(other)
    with pytest.raises(ValueError, match=r"--model_path: .*nowhere holds no saved state"):
        resnet_cifar.run(replace(other, model_path="nowhere"))
    assert list(tmp_path.iterdir()) == []


def test_parts_and_wrong_labels_are_of_the_training_set_alone(base):
    plain = deep_parts.assemble(base)
    noisy = deep_parts.assemble(replace(base, p_label_noise=0.5, frac_train=0.75, n_final_eval=7))
    assert len(noisy.images.labels) == len(noisy.images.images) == 48
    np.testing.assert_array_equal(noisy.images.images, plain.images.images[:48])
    assert (noisy.images.labels != plain.images.labels[:48]).sum() == 24
    np.testing.assert_array_equal(noisy.test_images.labels, plain.test_images.labels[:7])
    assert len(deep_parts.assemble(replace(base, n_final_eval=-1)).test_images.labels) == 64
    asym = deep_parts.assemble(replace(base, p_label_noise=1.0, noise_type="asym"))
    confusions = data.confusions("cifar10") or {}
    swapped = [confusions.get(y, y) for y in plain.images.labels.tolist()]
    assert asym.images.labels.tolist() == swapped


def test_the_evaluation_default_is_every_fifth_epoch(base):
    assert deep_parts.assemble(replace(base, eval_iter_freq=-1)).eval_every == 5 * 64 // 16


@pytest.mark.parametrize(
    ("dataset", "moved", "mirrored"),
    [("cifar10", 1, 1), ("svhn", 1, 0), ("mnist", 0, 0), ("cifar10_dog_cat_gs", 1, 1)],
)
def test_augmentation_is_the_released_codes(dataset, moved, mirrored):
    augment = deep_parts.augmentation(Config(dataset=dataset))
    assert (augment is not None) == bool(moved)
    if augment:
        ramp = np.tile(np.arange(100, 132, dtype=np.uint8)[:, None], (64, 32, 1, 1))
        rising = np.asarray(augment(jax.random.key(0), ramp))[:, 16, 8:24, 0].astype(int)
        falls = (np.diff(rising, axis=1) < 0).any(1)
        assert falls.any() == bool(mirrored)
    assert deep_parts.augmentation(Config(dataset=dataset, no_data_augm=True)) is None


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"lr_init": -0.1}, "--lr_init is -0.1"),
        ({"lr_init": float("nan")}, "--lr_init is nan"),
        ({"lr_schedule": "piecewise_04epochs"}, "Unknown schedule .* known are constant"),
        ({"model": "resnet19"}, "Unknown model .* known are .*resnet18_plain"),
        ({"dataset": "cifar11"}, "Unknown data set .* known are cifar10"),
        ({"batch_size": 12}, "--batch_size is 12, which can't be split over 8 devices"),
        ({"batch_size": 72}, "--batch_size is 72, more than the 64 training images"),
        ({"epochs": 0}, "--epochs is 0"),
        ({"momentum": 1.0}, "--momentum is 1.0"),
        ({"swa_tau": 1.0}, "--swa_tau is 1.0"),
        ({"bn_images": 31}, "--batch_size_eval is 32, more than the 31 training images"),
        ({"max_steps": -1}, "--max_steps is -1"),
        ({"exp_name": "../up"}, "plain file name"),
        ({"frac_train": 0.0}, "--frac_train is 0.0"),
        ({"frac_train": 0.2}, "more than the 12 training images of cifar10 .0.2 of them"),
        ({"p_label_noise": 1.5}, "--p_label_noise is 1.5"),
        ({"sgd_p_label_noise": float("nan")}, "--sgd_p_label_noise is nan"),
        ({"ln_schedule": "piecewise_2_3_3"}, "--ln_schedule: Unknown schedule"),
        (
            {"dataset": "mnist", "noise_type": "asym", "p_label_noise": 0.1},
            "--noise_type",
        ),
        ({"n_final_eval": 0}, "--n_final_eval is 0"),
        ({"eval_iter_freq": -2}, "--eval_iter_freq is -2"),
        ({"jacobian_tol": 0.0}, "--jacobian_tol is 0.0"),
        ({"keep": 0}, "--keep is 0"),
        ({"save_every_seconds": -1.0}, "--save_every_seconds is -1.0"),
        ({"fork_from": "run"}, "--fork_from RUN and --fork_step K go together"),
        ({"fork_step": 3}, "--fork_from RUN and --fork_step K go together"),
        ({"fork_from": "run", "fork_step": 3}, r"run has no state of step 3; .* \(none\)"),
        ({"fork_from": "run", "fork_step": 5}, "--fork_step is 5, and the run ends at step 5"),
        ({"fork_from": "a", "fork_step": 1, "model_path": "b"}, "both say where to begin"),
        ({"model": "vgg16", "droprate": 0.1}, "vgg16 takes neither dropout nor softplus"),
        ({"model": "resnet18_gn", "model_width": 3}, "width is 3; GroupNorm"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(base, wrong, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        resnet_cifar.run(replace(base, runs_dir=str(tmp_path), **wrong))
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_refused(base, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(PermissionError, match="--runs_dir"):
        resnet_cifar.run(replace(base, runs_dir=str(tmp_path / "file")))


def test_the_papers_command_lines_are_understood():
    from experiments.launch import cli

    large = (
        "--dataset=cifar10 --lr_init=0.75 --lr_schedule=piecewise_05epochs --warmup_exp=1.05 "
        "--model=resnet18_plain --model_width=64 --epochs=100 --batch_size=256 --momentum=0.0 "
        "--l2_reg=0.0 --no_data_augm --eval_iter_freq=200 --exp_name=no_explicit_reg"
    )
    config = cli.parse(Config, large.split())
    assert config.no_data_augm and config.warmup_exp == 1.05 and config.momentum == 0.0
    small = large.replace("0.75", "0.01").replace(
        "piecewise_05epochs --warmup_exp=1.05", "constant"
    )
    assert cli.parse(Config, small.split()).lr_schedule == "constant"
    assert deep_flags.run_name(config) != deep_flags.run_name(cli.parse(Config, small.split()))
    art = large.replace("--warmup_exp=1.05", "").replace("--no_data_augm", "--l2_reg=0.0005")
    assert not cli.parse(Config, art.split()).no_data_augm
    deep_parts.validate(config)


def test_the_penalty_passes_the_momentum():
    """Coupled L2: two steps of zero gradient still build up velocity from the weights alone."""
    import jax.numpy as jnp
    import optax

    tx = deep_parts.optimizer(Config(l2_reg=0.1, momentum=0.9), lambda step: 0.5)
    p, state = jnp.ones(()), tx.init(jnp.ones(()))
    for _ in range(2):
        update, state = tx.update(jnp.zeros(()), state, p)
        p = optax.apply_updates(p, update)
    velocity = 0.9 * 0.1 + 0.1 * 0.95
    np.testing.assert_allclose(p, 0.95 - 0.5 * velocity, rtol=1e-6)
