"""A grid of classifier runs: what it expands to, and what is run, skipped and refused."""

import json
import shutil
from dataclasses import replace

import jax
import pytest

from experiments import sweep_deep
from experiments.deep import config as flags
from experiments.launch import cli
from experiments.storage import records

pytestmark = pytest.mark.usefixtures("shallow", "compiled_once", "single_precision")


def grid(text):
    return cli.parse(sweep_deep.grid_type(), text.split())


def test_a_grid_is_the_product_of_its_lists_times_the_seeds():
    text = "--lr_init 0.01 0.05 0.75 --lr_schedule constant cosine --seed 0 1 --momentum 0.0"
    settings = sweep_deep.expand(grid(text))
    assert len(settings) == 6 and list(settings)[1] == "lr_init 0.01, lr_schedule cosine"
    runs = [config for configs in settings.values() for config in configs]
    assert len({flags.run_name(config) for config in runs}) == 12
    assert {config.momentum for config in runs} == {0.0}
    assert {(c.lr_init, c.lr_schedule, c.seed) for c in runs} == {
        (lr, name, seed)
        for lr in (0.01, 0.05, 0.75)
        for name in ("constant", "cosine")
        for seed in (0, 1)
    }
    (configs,) = sweep_deep.expand(grid("")).values()
    assert configs == [flags.Config()]


def test_paired_lists_are_walked_together():
    text = "--lr_init 0.002 0.05 --lr_schedule constant piecewise --paired --seed 3"
    settings = sweep_deep.expand(grid(text))
    assert [(c.lr_init, c.lr_schedule, c.seed) for (c,) in settings.values()] == [
        (0.002, "constant", 3),
        (0.05, "piecewise", 3),
    ]
    with pytest.raises(ValueError, match="--batch_size 3"):
        sweep_deep.expand(grid(f"{text} --batch_size 1 2 3"))


def test_what_the_name_of_a_run_does_not_tell_apart_gets_into_it():
    settings = sweep_deep.expand(grid("--momentum 0.0 0.9 --exp_name m"))
    names = [flags.run_name(config) for (config,) in settings.values()]
    assert [name.split("-cifar10")[0] for name in names] == ["m-momentum0.0", "m-momentum0.9"]


def test_flags_have_the_descriptions_of_a_single_run(capsys):
    with pytest.raises(SystemExit):
        grid("--help")
    text = capsys.readouterr().out
    assert "Heavy-ball momentum." in text and "--paired" in text


@pytest.fixture(scope="module")
def swept(small_cifar, shallow, tmp_path_factory):
    """A grid of which one run diverges, and its folder."""
    text = (
        "--lr_init 0.05 3e38 --lr_schedule constant --model shallow --model_width 2 "
        "--batch_size 16 --epochs 1"
    )
    with jax.enable_x64(False):
        runs_dir = str(tmp_path_factory.mktemp("runs"))
        chosen = replace(grid(text), data_dir=small_cifar, runs_dir=runs_dir)
        return chosen, sweep_deep.run(chosen)


def test_a_run_that_diverges_is_a_result(swept, capsys):
    chosen, folder = swept
    good, bad = json.loads((folder / "summary.json").read_text())["runs"]
    assert good["outcome"] == "finished" and good["last_row"]["step"] == 4
    assert "--lr_init" in bad["outcome"] and bad["last_row"]["step"] == 0
    assert {path.suffix for path in (folder / "figures").iterdir()} == {".png", ".pdf"}
    runs = folder.parent.parent / "resnet_cifar"
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.jsonl")}
    assert sweep_deep.run(chosen) == folder  # the same command: nothing is trained again
    out = capsys.readouterr().out
    assert "already" in out and "diverged before" in out and "1 diverged" in out
    assert before == {path: path.stat().st_mtime_ns for path in runs.rglob("*.jsonl")}


def test_a_run_that_was_cut_goes_on(swept, tmp_path):
    chosen, _ = swept
    moved = replace(chosen, lr_init=(0.05,), runs_dir=str(tmp_path))
    ((config,),) = sweep_deep.expand(moved).values()
    whole = records.run_folder(*flags.place_of(replace(config, runs_dir=chosen.runs_dir)))
    part = shutil.copytree(whole, records.run_folder(*flags.place_of(config)))
    shutil.rmtree(part / "checkpoints")  # as if cut before the first save
    sweep_deep.run(moved)
    last = lambda folder: records.read_rows(folder)[-1]["train/loss"]
    assert last(part) == last(whole)
    assert len(json.loads((part / "manifest.json").read_text())["starts"]) == 2


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"batch_size": (16, 72)}, "--batch_size is 72"),
        ({"lr_init": (0.1, -1.0)}, "--lr_init is -1.0"),
        ({"dataset": ("cifar10", "cifar12")}, "cifar12"),
        ({"model_path": ("a/b", "a_b")}, "--exp_name"),
    ],
)
def test_what_cannot_be_run_is_refused_before_anything_is(swept, wrong, named, tmp_path):
    with pytest.raises(ValueError, match=named):
        sweep_deep.run(replace(swept[0], runs_dir=str(tmp_path), **wrong))
    assert list(tmp_path.iterdir()) == []


def test_values_that_agree_in_six_digits_have_folders_of_their_own():
    settings = sweep_deep.expand(grid("--lr_init 0.12345678 0.12345679 --l2_reg 1e-9 1.000001e-9"))
    assert len({flags.run_name(config) for (config,) in settings.values()}) == 4
