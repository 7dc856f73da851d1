"""The command as its user runs it, in small."""

import json
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import diag_nets
from experiments.diag_nets import SETTINGS, Config
from experiments.launch import lock
from experiments.storage import npz, records
from experiments.toy import config as toy_flags, ensemble, run as toy_runs

SMALL = Config(seeds=3, num_steps=2_000, n=20, d=30, support=3, spectra_records=5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = replace(SMALL, runs_dir=str(tmp_path_factory.mktemp("runs")))
    return config, diag_nets.run(config).dataset


def folder_of(config):
    return Path(config.runs_dir) / "diag_nets" / (config.exp_name or config.setting)


def test_the_run_folder_holds_everything(finished):
    config, dataset = finished
    folder = folder_of(config)
    names = {path.name for path in folder.iterdir()} - {".lock"}
    assert names == {"config.json", "manifest.json", "summary.json", "arrays.npz", "figures"}
    figures = {path.name for path in (folder / "figures").iterdir()}
    assert figures == {"diag_nets_d1.png", "diag_nets_d1.pdf"}
    assert json.loads((folder / "config.json").read_text())["seeds"] == 3
    start = records.read_json(folder / "manifest.json")["starts"][0]
    assert start["seed"] == 0 and start["versions"]["jax"] and "finished" in start
    assert len(start["devices"]) == 8
    assert npz.load_dataset(folder).identical(dataset)
    assert dataset["train_loss"].dims == ("seed", "schedule", "step")
    assert dataset["rank"].dims == ("seed", "schedule", "spectra_step")
    assert dataset.sizes["spectra_step"] == 5
    assert dataset["shown_rank"].dims == ("schedule", "step")


def test_what_is_recorded_is_what_it_is_called(finished):
    _, dataset = finished
    first, last = dataset.isel(step=0), dataset.isel(step=-1)
    np.testing.assert_array_equal(first["support"], 0)  # v = 0 at initialization
    np.testing.assert_allclose(first["balancedness"], 30 * 0.1**2)
    np.testing.assert_allclose(first["imbalance"], 0.1 * 30**0.5)
    np.testing.assert_array_equal(dataset["rank"][..., 0], 30)
    small_steps = dataset["balancedness"].values[:, 0]
    assert (np.diff(small_steps) <= 1e-12).all()  # steps only shrink it
    problem = diag_nets.problems.data.sparse_regression(0, n=20, d=30, support=3)
    silent = 0.5 * np.mean(problem.train.y**2)
    np.testing.assert_allclose(first["train_loss"], silent, rtol=1e-12)
    assert (last["train_loss"][:, 0] < 0.1 * silent).all()


def test_snapshots_are_the_parameters_that_were_measured(finished):
    _, dataset = finished
    u, v = np.split(dataset["theta"].values[:, :, 1], 2, axis=-1)
    problem = diag_nets.problems.data.sparse_regression(0, n=20, d=30, support=3)
    residual = np.einsum("nd,scd->scn", problem.train.x, u * v) - problem.train.y
    ours = 0.5 * (residual**2).mean(-1)
    np.testing.assert_allclose(dataset["train_loss"][..., -1], ours, rtol=1e-9)
    shown = int(dataset["shown_seed"][0])
    np.testing.assert_array_equal(dataset["shown_theta"][:, -1], dataset["theta"][shown, :, 1])
    at = np.isin(dataset["step"], dataset["spectra_step"])
    np.testing.assert_array_equal(dataset["shown_rank"][:, at], dataset["rank"][shown])


def test_the_same_command_again_shows_the_same_run(finished, capsys):
    config, dataset = finished
    before = (folder_of(config) / "arrays.npz").stat().st_mtime_ns
    chunks = folder_of(config) / "chunks"  # as a kill between the last two steps leaves them
    chunks.mkdir()
    again = diag_nets.run(config).dataset
    assert not chunks.exists()
    assert "is finished" in capsys.readouterr().out
    with lock.holding(folder_of(config)):  # to read results takes no lock
        diag_nets.run(config)
    assert (folder_of(config) / "arrays.npz").stat().st_mtime_ns == before
    assert again.identical(dataset)


def test_other_settings_under_the_same_name_are_refused(finished):
    config, _ = finished
    with pytest.raises(ValueError, match="seeds 3 -> 4"):
        diag_nets.run(replace(config, seeds=4))


def test_seeds_do_not_depend_on_how_many_there_are_nor_on_blocks(finished, monkeypatch):
    config, dataset = finished
    toy = diag_nets.problems.diagonal(n=20, d=30, support=3)
    monkeypatch.setattr(ensemble, "RUNS_AT_A_TIME", 1)  # two seeds a block, one of them left over
    fewer = ensemble.simulate(replace(config, seeds=2), toy)
    for name in ("train_loss", "support", "rank", "theta"):
        np.testing.assert_allclose(fewer[name], dataset[name][:2], rtol=1e-10, atol=1e-14)


def test_gradient_descent_and_sgd_stand_side_by_side_in_the_order_asked(tmp_path):
    config = replace(
        SMALL,
        num_steps=200,
        step_sizes=(0.2, 0.5, 0.2, 0.5),
        decay_times=(1.0,) * 4,
        decay_factors=(1.0,) * 4,
        batch_sizes=(1, 20, 20, 4),
        runs_dir=str(tmp_path),
    )
    dataset = diag_nets.run(config).dataset
    labels = [str(label) for label in dataset["schedule"].values]
    assert labels == [
        "η = 0.2, constant",
        "GD, η = 0.5, constant",
        "GD, η = 0.2, constant",
        "b = 4, η = 0.5, constant",
    ]
    problem = diag_nets.problems.data.sparse_regression(0, n=20, d=30, support=3)
    x, y = problem.train
    for j, eta in ((1, 0.5), (2, 0.2)):
        u, v = np.full(30, 0.1), np.zeros(30)
        for _ in range(int(dataset["step"][-1])):
            g = x.T @ (x @ (u * v) - y) / 20
            u, v = u - eta * g * v, v - eta * g * u
        expected = np.mean((x @ (u * v) - y) ** 2) / 2
        np.testing.assert_allclose(dataset["train_loss"][:, j, -1], expected, rtol=1e-4)
    spread = dataset["train_loss"].isel(step=-1).std("seed").values
    assert spread[0] > 1e-3 * spread[1] and 0 < spread[1] < 1e-6  # the jitter, and nothing else


def test_diverged_runs_are_counted_and_shown(tmp_path, capsys):
    wild = replace(
        SMALL,
        step_sizes=(0.2, 50.0),
        decay_times=(1.0, 0.5),
        decay_factors=(1.0, 2.0),
        warmup_gains=(0.0, 0.0),
        batch_sizes=(1, 1),
        runs_dir=str(tmp_path),
    )
    finding = diag_nets.run(wild)
    dataset = finding.dataset
    assert (
        np.isnan(dataset["train_loss"][:, 1, -1]).all()
        and np.isnan(dataset["rank"][:, 1, -1]).all()
    )
    assert np.isfinite(dataset["train_loss"][:, 0]).all()
    assert "100%" in capsys.readouterr().out
    shares = {row.schedule: row.share_diverged for row in finding.rows}
    assert list(shares.values()) == [0.0, 1.0]


def test_the_decay_comes_after_the_step_that_it_names():
    config = replace(SMALL, num_steps=11, decay_times=(1.0, 0.3, 0.5, 0.9))
    schedule = toy_runs.schedules(config)
    assert schedule.decay_step.tolist() == [11, 3, 5, 9]  # int(share * steps)
    toy = diag_nets.problems.diagonal(n=20, d=30, support=3)
    one = toy_runs.Schedule(*(leaf[1] for leaf in schedule))
    sizes = [float(toy_runs.step_size(one, toy, 11)(step)) for step in range(6)]
    np.testing.assert_allclose(sizes, [0.282] * 4 + [0.282 / 4.8] * 2)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"seeds": 0}, "--seeds"),
        ({"step_sizes": (-0.1,) * 4}, "--step_sizes"),
        ({"step_sizes": (float("nan"),) * 4}, "--step_sizes"),
        ({"decay_times": (2.0,) * 4}, "--decay_times"),
        ({"decay_factors": (1.0,)}, "--decay_factors 1,.* give each schedule one of each"),
        ({"batch_sizes": (1, 1, 1, 21)}, "--batch_sizes is 21, .* 20 training examples"),
        ({"warmup_gains": (-2.0,) * 4}, "--warmup_gains"),
        ({"warmup_exponent": 0.0}, "--warmup_exponent is 0.0"),
        ({"init_scale": -1.0}, "--init_scale is -1.0"),
        ({"gd_jitter": 2.0}, "--gd_jitter is 2.0"),
        ({"momentum": 1.0}, "--momentum is 1.0"),
        ({"sam_rho": -1.0}, "--sam_rho is -1.0"),
        ({"support": 31}, "--support is 31, more than --d 30"),
        ({"spectra_records": 0}, "--spectra_records is 0"),
        ({"exp_name": "a/b"}, "plain file name"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(wrong, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        diag_nets.run(replace(SMALL, runs_dir=str(tmp_path), **wrong))
    assert list(tmp_path.iterdir()) == []


def test_the_papers_settings_are_recognized():
    assert diag_nets.published(Config(seeds=5, exp_name="x", runs_dir="y", spectra_records=3))
    assert not diag_nets.published(Config(n=81))
    for name, setting in SETTINGS.items():
        schedules = len(setting.step_sizes)
        assert {len(values) for values in diag_nets.published(setting).values()} == {schedules}
        assert setting.setting == name
    steps = toy_flags.record_steps(Config())
    assert len(steps) == 348 and len(toy_flags.spectra_steps(Config())) == 40


def numpy_descent(steps, *, eta, momentum=0.0, decay=0.0, rho=0.0, examples=False, average=0.0):
    """Full-batch descent of the small problem, and the losses at the recorded steps."""
    x, y = diag_nets.problems.data.sparse_regression(0, n=20, d=30, support=3).train
    gradient = lambda u, v, x, y: (
        x.T @ (x @ (u * v) - y) * v / len(y),
        x.T @ (x @ (u * v) - y) * u / len(y),
    )
    u, v = np.full(30, 0.1), np.zeros(30)
    mu, mv, au, av, losses = np.zeros(30), np.zeros(30), u, v, []
    for step in range(steps[-1] + 1):
        if step in steps:
            losses.append(np.mean((x @ (au * av) - y) ** 2) / 2)
        if examples:
            parts = []
            for i in range(20):
                one = x[i : i + 1], y[i : i + 1]
                gu, gv = gradient(u, v, *one)
                parts.append(gradient(u + rho * gu, v + rho * gv, *one))
            gu, gv = (np.mean([part[k] for part in parts], axis=0) for k in (0, 1))
        else:
            gu, gv = gradient(u, v, x, y)
            gu, gv = gradient(u + rho * gu, v + rho * gv, x, y)
        mu, mv = momentum * mu + gu + decay * u, momentum * mv + gv + decay * v
        u, v = u - eta * mu, v - eta * mv
        au, av = average * au + (1 - average) * u, average * av + (1 - average) * v
    return losses


@pytest.mark.parametrize(
    ("flags", "loop"),
    [
        ({"momentum": 0.5, "weight_decay": 0.01}, {"momentum": 0.5, "decay": 0.01}),
        ({"sam_rho": 0.05}, {"rho": 0.05}),
        (
            {"sam_rho": 0.05, "sam_of": "examples", "average": 0.9},
            {"rho": 0.05, "examples": True, "average": 0.9},
        ),
    ],
)
def test_the_flags_of_descent_do_what_they_say(flags, loop):
    toy = diag_nets.problems.diagonal(n=20, d=30, support=3)
    descent = toy_runs.Descent(**flags)
    config = replace(SMALL, num_steps=120)
    at = toy_flags.record_steps(config)
    run = toy_runs.make_run(
        toy, num_steps=120, batch_size=20, at=at, snapshots_at=at[-1:], descent=descent
    )
    never = toy_runs.Schedule(*map(np.asarray, (0.3, 0.0, 1.0, 120, 1.0, 1.0)))
    rows, _ = jax.jit(run)(toy_runs.seed_keys(0, 1)[0], never)
    np.testing.assert_allclose(rows["train_loss"], numpy_descent(at, eta=0.3, **loop), rtol=1e-8)


def test_label_noise_and_the_valley_floor_are_there_and_decay():
    toy = diag_nets.problems.diagonal(n=20, d=30, support=3)
    at = np.array([0, 50, 999])
    never = toy_runs.Schedule(*map(np.asarray, (0.1, 0.0, 1.0, 1000, 1.0, 1.0)))
    key = toy_runs.seed_keys(0, 1)[0]

    def losses(**flags):
        run = toy_runs.make_run(
            toy,
            num_steps=1000,
            batch_size=1,
            at=at,
            snapshots_at=at[:1],
            descent=toy_runs.Descent(**flags),
        )
        return np.asarray(jax.jit(run)(key, never)[0]["train_loss"])

    plain, noisy, floor = losses(), losses(label_noise=0.5), losses(valley_steps=300)
    assert plain[0] == noisy[0] and noisy[-1] > 10 * plain[-1]
    assert (floor < 0.2 * plain).all()


def test_a_run_is_gone_from_where_its_loss_left_for_good():
    inf, nan = np.inf, np.nan
    losses = np.array([[1, 5e3, 2, 1, 1], [1, 2, 5e3, 1e200, inf], [1, 2, 3, nan, nan]])
    expected = [[0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
    np.testing.assert_array_equal(ensemble.departed(losses), np.array(expected, bool))
