"""The fully connected experiments at small size, and their schedules."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import fc_nets
from experiments.fc_nets import SETTINGS
from experiments.storage import records
from experiments.toy import config as toys, problems, run as toy_runs

pytestmark = pytest.mark.usefixtures("unrendered", "quick_compilation")


@pytest.mark.parametrize(
    ("setting", "more"),
    [("1d", ["_functions"]), pytest.param("two-layer", ["_neurons"], marks=pytest.mark.slow)],
)
def test_the_run_folder_has_data_figures_and_summary(setting, more, tmp_path):
    config = replace(
        SETTINGS[setting], seeds=2, num_steps=300, spectra_records=1, runs_dir=str(tmp_path)
    )
    finding = fc_nets.run(config)
    dataset, folder = finding.dataset, tmp_path / "fc_nets" / setting
    stems = {f"fc_nets_{setting}{suffix}" for suffix in ("", *more)}
    assert {path.stem for path in finding.figures if path.exists()} == stems
    assert len(records.read_json(folder / "summary.json")["rows"]) == len(finding.rows)
    assert not any(row.published for row in finding.rows)  # 300 steps aren't the paper's setting
    # Flips count from the initialization, which all schedules of a seed share.
    np.testing.assert_array_equal(dataset["flips_1"][..., 0], 0)
    starts = dataset["theta"].sel(end="start").values
    np.testing.assert_array_equal(starts[:, 0], starts[:, -1])
    assert not np.array_equal(starts[0], starts[1])
    # A single record of singular values is of the trained network, also in the table.
    toy = problems.PROBLEMS[setting]()
    trained = toy_runs.parameters(toy, dataset["theta"].sel(end="end").values[1, 0])
    shown = {row.name: row.values for row in reversed(finding.rows)}  # of the first schedule
    measured = jax.jit(toy.spectra)(trained) | {"test_loss": toy.mean_loss(trained, toy.test)}
    for name, value in measured.items():
        np.testing.assert_allclose(dataset[name][1, 0, -1], value, rtol=1e-9)
        if name in shown:
            np.testing.assert_allclose(shown[name][1], value, rtol=1e-9)


@pytest.mark.parametrize(
    ("setting", "schedule", "start", "gain", "exponent", "end", "factor"),
    [
        # eta (1 + (400 f - 1) i / N) up to i = f N, then over the factor from that step on.
        ("1d", 0, 2e-4, 7, 1, 632, 2.5),
        ("1d-overregularized", 1, 2e-4, 249, 1, 15811, 3),
        ("two-layer", 0, 0.13, 0, 1, 14126, 1),
        ("two-layer", 2, 0.455, 0, 1, 4237, 4),
        ("three-layer", 3, 0.04, 5, 0.5, 5000, 5),
    ],
)
def test_step_sizes_are_the_papers(setting, schedule, start, gain, exponent, end, factor):
    config = SETTINGS[setting]
    toy = problems.PROBLEMS[fc_nets.PROBLEM.get(setting, setting)]()
    points = toys.resolve("fc_nets", config, toy).schedules
    one = toy_runs.Schedule(*(leaf[schedule] for leaf in points))
    steps = np.unique([631, 632, *np.linspace(0, config.num_steps - 1, 301).astype(int)])
    actual = jax.vmap(toy_runs.step_size(one, toy, config.num_steps))(jnp.asarray(steps))
    warm = start * (1 + gain * (np.minimum(steps, end) / config.num_steps) ** exponent)
    np.testing.assert_allclose(actual, warm / np.where(steps < end, 1, factor), rtol=1e-12)


def test_initializations_are_the_papers_times_their_scale():
    def drawn(name):
        toy = problems.PROBLEMS[name]()
        draw = lambda key: toy.network(1.0).init(key, toy.train.x)[0]
        many = jax.jit(lambda keys: jax.lax.map(draw, keys))  # compiles faster than vmap
        return jax.tree.map(np.asarray, many(jax.random.split(jax.random.key(0), 500)))

    one = drawn("1d")
    assert set(np.unique(one["layer1"]["kernel"])) == {-2.5, 2.5}
    np.testing.assert_allclose(one["layer1"]["bias"].std(), 2.5, rtol=0.02)
    np.testing.assert_allclose(one["layer2"]["kernel"].std(), 4.0, rtol=0.02)
    assert "bias" not in one["layer2"]
    two = drawn("two-layer")
    np.testing.assert_allclose(two["layer1"]["kernel"].std(), 0.5, rtol=0.02)
    np.testing.assert_array_equal(two["layer2"]["kernel"], 0.0)
    three = drawn("three-layer")
    np.testing.assert_allclose(three["layer2"]["kernel"].std(), 0.8, rtol=0.02)
    assert 0.9 < np.abs(three["layer1"]["bias"]).max() * 5**0.5 <= 1
    toy, key = problems.PROBLEMS["1d"](), jax.random.key(3)
    whole, half = (toy.network(scale).init(key, toy.train.x)[0] for scale in (1.0, 0.5))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(0.5 * a, b, rtol=1e-12), whole, half)
