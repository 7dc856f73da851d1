"""The command as its user runs it, in small."""

import json
from dataclasses import replace

import numpy as np
import pytest

from experiments import diag_nets, records
from experiments.diag_nets import Config

SMALL = Config(seeds=3, num_steps=2_000, n=20, d=30, support=3, rank_records=5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    config = replace(SMALL, runs_dir=str(tmp_path_factory.mktemp("runs")))
    return config, diag_nets.run(config)


def folder_of(config):
    from pathlib import Path

    return Path(config.runs_dir) / "diag_nets" / config.exp_name


def test_the_run_folder_holds_everything(finished):
    config, result = finished
    folder = folder_of(config)
    names = {path.name for path in folder.iterdir()}
    assert names == {"config.json", "manifest.json", "metrics.jsonl", "arrays.npz", "figures"}
    assert {path.name for path in (folder / "figures").iterdir()} == {
        "diag_nets.png",
        "diag_nets.pdf",
    }
    assert json.loads((folder / "config.json").read_text())["seeds"] == 3
    start = records.read_json(folder / "manifest.json")["starts"][0]
    assert start["seed"] == 0 and start["versions"]["jax"] and "finished" in start
    assert len(start["devices"]) == 8
    arrays = records.load_arrays(folder)
    for name, leaf in result._asdict().items():
        np.testing.assert_array_equal(arrays[name], leaf)
    assert arrays["train_loss"].shape == (3, 4, len(arrays["step"]))
    assert arrays["rank"].shape == (3, 4, 5) == (3, 4, len(arrays["rank_step"]))


def test_what_is_recorded_is_what_it_is_called(finished):
    _, result = finished
    np.testing.assert_array_equal(result.support[..., 0], 0)  # v = 0 at initialization
    np.testing.assert_allclose(result.balancedness[..., 0], 30 * 0.1**2)
    np.testing.assert_array_equal(result.rank[..., 0], 30)
    assert (np.diff(result.balancedness[:, 0]) <= 1e-12).all()  # steps only shrink it
    problem = diag_nets.data.sparse_regression(0, n=20, d=30, support=3)
    silent = 0.5 * np.mean(problem.train.y**2)
    np.testing.assert_allclose(result.train_loss[..., 0], silent, rtol=1e-12)
    assert (result.train_loss[:, 0, -1] < 0.1 * silent).all()


def test_the_same_command_again_shows_the_same_run(finished, capsys):
    config, result = finished
    before = (folder_of(config) / "arrays.npz").stat().st_mtime_ns
    again = diag_nets.run(config)
    assert "is finished" in capsys.readouterr().out
    assert (folder_of(config) / "arrays.npz").stat().st_mtime_ns == before
    np.testing.assert_array_equal(again.u, result.u)


def test_other_settings_under_the_same_name_are_refused(finished):
    config, _ = finished
    with pytest.raises(ValueError, match="seeds 3 -> 4"):
        diag_nets.run(replace(config, seeds=4))


def test_seeds_do_not_depend_on_how_many_there_are(finished, tmp_path):
    config, result = finished
    fewer_seeds = replace(config, seeds=2, runs_dir=str(tmp_path))
    folder_of(fewer_seeds).mkdir(parents=True)
    records.append_row(folder_of(fewer_seeds), {"left": "by a run that was killed"})
    fewer = diag_nets.run(fewer_seeds)
    assert len(records.read_rows(folder_of(fewer_seeds))) == 4
    np.testing.assert_allclose(fewer.train_loss, result.train_loss[:2], rtol=1e-10)


def test_diverged_runs_are_counted_and_shown(tmp_path, capsys):
    wild = replace(
        SMALL,
        step_sizes=(0.2, 50.0),
        decay_times=(1.0, 0.5),
        decay_factors=(1.0, 2.0),
        runs_dir=str(tmp_path),
    )
    result = diag_nets.run(wild)
    assert np.isnan(result.train_loss[:, 1, -1]).all() and np.isnan(result.rank[:, 1, -1]).all()
    assert np.isfinite(result.train_loss[:, 0]).all()
    assert "100%" in capsys.readouterr().out
    rows = records.read_rows(folder_of(wild))
    assert [row["share_diverged"] for row in rows] == [0.0, 1.0]


def test_the_decay_comes_after_the_step_that_it_names():
    config = replace(SMALL, num_steps=11, decay_times=(1.0, 0.3, 0.5, 0.9))
    schedule = diag_nets.schedules(config)
    assert schedule.decay_step.tolist() == [11, 3, 5, 9]  # int(share * steps)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"seeds": 0}, "--seeds is 0; it must be 1 or more"),
        ({"step_sizes": (-0.1,) * 4}, "--step_sizes holds -0.1"),
        ({"step_sizes": (float("nan"),) * 4}, "--step_sizes holds nan"),
        ({"decay_times": (2.0,) * 4}, "--decay_times holds 2.0"),
        ({"decay_factors": (1.0,)}, "--decay_factors 1; give each schedule one of each"),
        ({"support": 31}, "--support is 31, more than --d 30"),
        ({"rank_records": 0}, "--rank_records is 0"),
        ({"exp_name": "a/b"}, "plain file name"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_written(wrong, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        diag_nets.run(replace(SMALL, runs_dir=str(tmp_path), **wrong))
    assert list(tmp_path.iterdir()) == []


def test_the_papers_setting_is_recognized():
    assert diag_nets.is_the_papers(Config(seeds=5, exp_name="x", runs_dir="y"))
    assert not diag_nets.is_the_papers(Config(n=81))
    steps = diag_nets.record_steps(Config())
    assert len(steps) == 348 and len(diag_nets.rank_steps(Config())) >= 30
