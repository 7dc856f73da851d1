"""The command at small size."""

import os
from dataclasses import replace

import jax
import numpy as np
import pytest
import xarray

from experiments import diag_nets
from experiments.diag_nets import Config
from experiments.storage import records
from experiments.toy import config as toys, ensemble, problems
from experiments.toy.run import Descent, Schedule, make_run, seed_keys
from sgd_sparse_jax import data

pytestmark = pytest.mark.usefixtures("quick_compilation")
SIZES = {"n": 20, "d": 30, "support": 3}
TOY = problems.diagonal(**SIZES)
X, Y = data.sparse_regression(0, **SIZES).train
# SGD, gradient descent, SGD that diverges, gradient descent that decays: two programs, interleaved.
SMALL = Config(
    step_sizes=(0.2, 0.5, 50.0, 0.2),
    decay_times=(1.0, 1.0, 0.5, 0.3),
    decay_factors=(1.0, 1.0, 2.0, 4.0),
    warmup_gains=(0.0,) * 4,
    batch_sizes=(1, 20, 1, 20),
    seeds=3,
    num_steps=1_000,
    spectra_records=5,
    **SIZES,
)


@pytest.fixture(scope="module")
def finding(unrendered, tmp_path_factory):
    return diag_nets.run(replace(SMALL, runs_dir=str(tmp_path_factory.mktemp("runs"))))


def test_the_run_folder_has_all_files(finding):
    folder, dataset = finding.folder, finding.dataset
    files = ["config.json", "figures", "manifest.json", "results.nc", "summary.json"]
    assert sorted(os.listdir(folder)) == [".lock", *files]
    assert sorted(os.listdir(folder / "figures")) == ["diag_nets_d1.pdf", "diag_nets_d1.png"]
    start = records.read_json(folder / "manifest.json")["starts"][0]
    assert start["seed"] == 0 and start["versions"]["jax"] and len(start["devices"]) == 8
    assert records.read_json(folder / "summary.json")["rows"][0]["values"] == 3
    with xarray.open_dataset(folder / "results.nc") as found:
        assert found.identical(dataset)
    assert dataset["train_loss"].dims == ("seed", "schedule", "step")
    assert dataset["rank"].dims == ("seed", "schedule", "spectra_step")
    assert dataset["spectra_step"].size == 5 and dataset["spectra_step"][-1] == dataset["step"][-1]


def test_records_agree_with_their_names(finding):
    first, last = finding.dataset.isel(step=0), finding.dataset.isel(step=-1)
    np.testing.assert_array_equal(first["support"], 0)  # v = 0 at initialization
    np.testing.assert_allclose(first["balancedness"], 30 * 0.1**2)
    np.testing.assert_array_equal(finding.dataset["rank"][..., 0], 30)
    small_steps = finding.dataset["balancedness"].values[:, 0]
    assert (np.diff(small_steps) <= 1e-12).all()  # steps only shrink it
    silent = 0.5 * np.mean(Y**2)
    np.testing.assert_allclose(first["train_loss"], silent, rtol=1e-8)
    assert (last["train_loss"][:, 0] < 0.1 * silent).all()


def test_shown_records_are_those_of_the_shown_seed(finding):
    dataset = finding.dataset
    shown = int(dataset["shown_seed"][0])
    np.testing.assert_array_equal(dataset["shown_theta"][:, -1], dataset["theta"][shown, :, 1])
    at = np.isin(dataset["step"], dataset["spectra_step"])
    np.testing.assert_array_equal(dataset["shown_rank"][:2, at], dataset["rank"][shown, :2])


def test_schedules_keep_their_order_and_gradient_descent_is_the_loop(finding):
    losses = finding.dataset["train_loss"].isel(step=-1).values
    labels = [str(label) for label in finding.dataset["schedule"].values]
    assert labels == [
        "SGD, η = 0.2, constant",
        "GD, η = 0.5, constant",
        "SGD, η = 50, /2 at 50%",
        "GD, η = 0.2, /4 at 30%",
    ]
    for j, eta, decays in ((1, 0.5, 1000), (3, 0.2, 300)):  # it decays after step 300
        sizes = lambda step, eta=eta, decays=decays: eta if step <= decays else eta / 4
        expected = numpy_descent([int(finding.dataset["step"][-1])], eta=sizes)
        np.testing.assert_allclose(losses[:, j], np.full(3, expected), rtol=1e-4)
    spread = losses.std(0)
    assert spread[0] > 1e-3 * losses[0, 0] and 0 < spread[1] < 1e-6  # the jitter, and nothing else


def test_diverged_runs_are_nan_and_counted(finding):
    dataset = finding.dataset
    assert np.isnan(dataset["train_loss"][:, 2, -1]).all()
    assert np.isnan(dataset["rank"][:, 2, -1]).all()
    assert np.isfinite(dataset["train_loss"][:, [0, 1, 3]]).all()
    shares = {row.schedule: row.share_diverged for row in finding.rows}
    assert list(shares.values()) == [0.0, 0.0, 1.0, 0.0]
    inf, nan = np.inf, np.nan
    losses = np.array([[1, 5e3, 2, 1, 1], [1, 2, 5e3, 1e200, inf], [1, 2, 3, nan, nan]])
    expected = [[0, 0, 0, 0, 0], [0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]
    np.testing.assert_array_equal(ensemble.diverged(losses), np.array(expected, bool))


def test_equal_schedules_have_different_labels():
    equal = replace(SMALL, step_sizes=(0.2,) * 4, batch_sizes=(1,) * 4, decay_factors=(1.0,) * 4)
    assert len(set(toys.resolve("diag_nets", equal, TOY).labels)) == 4


def numpy_descent(
    steps, *, eta, momentum=0.0, weight_decay=0.0, sam_rho=0.0, sam_of="batch", average=0.0
):
    """Full-batch descent of the small problem, and the losses at the recorded steps."""

    def gradient(w, x, y):
        residual = x.T @ (x @ (w[0] * w[1]) - y) / len(y)
        return np.stack([residual * w[1], residual * w[0]])

    batches = [(X[i : i + 1], Y[i : i + 1]) for i in range(20)]
    batches = batches if sam_of == "examples" else [(X, Y)]
    w, losses = np.stack([np.full(30, 0.1), np.zeros(30)]), []
    trace, averaged = 0 * w, w
    for step in range(steps[-1] + 1):
        if step in steps:
            losses.append(np.mean((X @ averaged.prod(0) - Y) ** 2) / 2)
        ascended = [gradient(w + sam_rho * gradient(w, *batch), *batch) for batch in batches]
        trace = momentum * trace + np.mean(ascended, axis=0) + weight_decay * w
        w = w - eta(step) * trace
        averaged = average * averaged + (1 - average) * w
    return losses


def losses_of(at, **flags):
    """Losses of full-batch descent at the steps `at`, with a constant step size of 0.1."""
    steps = int(at[-1]) + 1
    probe = (lambda initial, params: TOY.mean_loss(params, TOY.train), at)
    run = make_run(TOY, num_steps=steps, batch_size=20, probes=[probe], descent=Descent(**flags))
    constant = Schedule(*map(np.asarray, (0.1, 0.0, 1.0, steps, 1.0, 1.0)))
    return np.asarray(jax.jit(run)(seed_keys(0, 1)[0], constant)[0])


@pytest.mark.parametrize(
    "flags",
    [
        {"sam_rho": 0.05, "momentum": 0.5, "weight_decay": 0.01},
        {"sam_rho": 0.05, "sam_of": "examples", "average": 0.9},
    ],
)
def test_descent_flags_match_numpy(flags):
    at = np.array([0, 1, 2, 50, 119])
    expected = numpy_descent(at, eta=lambda step: 0.1, **flags)
    np.testing.assert_allclose(losses_of(at, **flags), expected, rtol=1e-8)


def test_label_noise_raises_and_the_valley_floor_lowers_the_loss():
    at = np.array([0, 50, 999])
    plain, noisy = losses_of(at), losses_of(at, label_noise=2.0)
    assert plain[0] == noisy[0] and noisy[-1] > 10 * plain[-1]
    assert (losses_of(at, valley_steps=300) < 0.2 * plain).all()
