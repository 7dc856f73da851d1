"""Grids of classifier runs: expansion, and runs that are trained, skipped or refused."""

import itertools
from dataclasses import replace

import jax
import pytest

from experiments import sweep_deep
from experiments.deep import training
from experiments.deep.config import folder_of
from experiments.launch import cli
from experiments.storage import records

pytestmark = pytest.mark.usefixtures("shallow", "unrendered", "single_precision")


def grid(text):
    return cli.parse(sweep_deep.grid_type(), text.split())


def test_a_grid_is_the_product_of_its_lists_times_the_seeds():
    text = "--lr_init 0.01 0.05 --lr_schedule constant cosine --seed 0 1 --momentum 0.0"
    settings = sweep_deep.expand(grid(text))
    assert len(settings) == 4 and list(settings)[1] == "lr_init 0.01, lr_schedule cosine"
    runs = [config for configs in settings.values() for config in configs]
    points = [(c.lr_init, c.lr_schedule, c.seed, c.momentum) for c in runs]
    names = ("constant", "cosine")
    assert points == list(itertools.product((0.01, 0.05), names, (0, 1), (0.0,)))


def test_paired_lists_are_zipped():
    text = "--lr_init 0.002 0.05 --lr_schedule constant piecewise --paired --seed 3"
    settings = sweep_deep.expand(grid(text))
    points = [(c.lr_init, c.lr_schedule, c.seed) for (c,) in settings.values()]
    assert points == [(0.002, "constant", 3), (0.05, "piecewise", 3)]
    with pytest.raises(ValueError, match="--batch_size 3"):
        sweep_deep.expand(grid(f"{text} --batch_size 1 2 3"))


@pytest.mark.parametrize(
    ("flags", "names"),
    [
        ("--momentum 0.0 0.9 --exp_name m", ["m-momentum0.0-cifar10", "m-momentum0.9-cifar10"]),
        ("--lr_init 0.75 1e-5 2 0.12345679", ["-lr0.75-", "-lr1e-05-", "-lr2-", "-lr0.12345679-"]),
        ("--l2_reg 1e-9 1.000001e-9", ["-l2_reg1e-09-", "-l2_reg1.000001e-09-"]),
    ],
)
def test_each_setting_has_its_own_folder(flags, names):
    folders = [folder_of(config).name for (config,) in sweep_deep.expand(grid(flags)).values()]
    for name, folder in zip(names, folders, strict=True):
        assert name in folder


def test_settings_that_would_share_a_folder_are_refused():
    """A path in a folder's name has _ for /."""
    with pytest.raises(ValueError, match="--exp_name"):
        sweep_deep.expand(grid("--model_path runs/a runs_a"))
    apart = "--model_path runs/a b --exp_name one", "--model_path runs_a b --exp_name two"
    runs = [each for text in apart for each in sweep_deep.expand(grid(text)).values()]
    assert len({folder_of(config) for (config,) in runs}) == 4


@pytest.fixture(scope="module")
def swept(small_cifar, shallow, tmp_path_factory):
    """A grid of which one run diverges, and its folder."""
    text = "--lr_init 0.05 3e38 --lr_schedule constant --model shallow --model_width 2 --epochs 1"
    runs_dir = str(tmp_path_factory.mktemp("runs"))
    chosen = replace(grid(text), batch_size=(16,), data_dir=small_cifar, runs_dir=runs_dir)
    with jax.enable_x64(False):
        return chosen, sweep_deep.run(chosen)


def test_a_run_that_diverges_is_a_result(swept, capsys):
    chosen, folder = swept
    good, bad = records.read_json(folder / "summary.json")["runs"]
    assert good["outcome"] == "finished" and good["last_row"]["step"] == 4
    assert "--lr_init" in bad["outcome"] and bad["last_row"]["step"] == 0
    assert {path.suffix for path in (folder / "figures").iterdir()} == {".png", ".pdf"}
    assert sweep_deep.run(chosen) == folder  # the same command: nothing is trained again
    out = capsys.readouterr().out
    assert "already" in out and "diverged in an earlier start" in out and "1 diverged" in out


def test_parts_run_a_share_each_and_the_last_one_compares(swept, tmp_path, capsys, monkeypatch):
    chosen = replace(swept[0], lr_init=(0.05, 0.02), seed=(0, 1), runs_dir=str(tmp_path))
    first = sweep_deep.run(replace(chosen, part="1/2"))
    runs = sorted(path.name for path in (tmp_path / "resnet_cifar").iterdir())
    assert len(runs) == 2 and not (first / "summary.json").exists()
    assert "2 of 4 runs, of other parts, are not finished" in capsys.readouterr().out
    for name, value in {"ID": 8, "MIN": 7, "COUNT": 2}.items():  # the second task of an array
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    assert sweep_deep.run(chosen) == first
    assert [run["outcome"] for run in records.read_json(first / "summary.json")["runs"]] == [
        "finished"
    ] * 4
    with pytest.raises(ValueError, match="--part"):
        sweep_deep.run(replace(chosen, part="3/2"))


def test_runs_that_differ_in_numbers_are_compiled_once(swept, tmp_path, caplog):
    (config,), _ = sweep_deep.expand(replace(swept[0], runs_dir=str(tmp_path))).values()
    curvature = {"curvature_every": 20, "curvature_examples": 16}
    config = replace(config, sgd_p_label_noise=0.2, l2_reg=1e-3, **curvature)
    training.run(config)
    other = {"lr_init": 0.01, "lr_schedule": "cosine", "momentum": 0.5, "l2_reg": 1e-4, "seed": 3}
    with jax.log_compiles(), caplog.at_level("WARNING"):
        training.run(replace(config, sgd_p_label_noise=0.1, **other))
    compiled = [text for text in caplog.messages if "Finished XLA compilation" in text]
    slow = ("_advance", "initial_state", "totals", "observe", "of_batch", "norms", "sampler")
    slow += ("_hessian_product", "_observe", "add_gradient")
    assert not [text for text in compiled if any(name in text for name in slow)], compiled


def test_invalid_runs_are_refused_before_any_run(swept, tmp_path):
    for name, values in (("batch_size", (16, 72)), ("dataset", ("cifar10", "cifar12"))):
        with pytest.raises(ValueError, match=f"--{name}"):
            sweep_deep.run(replace(swept[0], runs_dir=str(tmp_path), **{name: values}))
    assert list(tmp_path.iterdir()) == []
