"""A grid of classifier runs: what it expands to, and what is run, skipped and told."""

import json
import shutil
from dataclasses import replace

import jax
import pytest

from experiments import sweep_deep
from experiments.deep import config as deep_flags
from experiments.launch import cli
from experiments.storage import records
from sgd_sparse_jax import models

pytestmark = pytest.mark.usefixtures("compiled_once", "single_precision")


def grid(*words):
    return cli.parse(sweep_deep.grid_type(), list(words))


def test_a_grid_is_the_product_of_its_lists_times_the_seeds():
    flags = "--lr_init 0.01 0.05 0.75 --lr_schedule constant cosine --seed 0 1 --momentum 0.0"
    settings = sweep_deep.expand(grid(*flags.split()))
    assert len(settings) == 6
    assert list(settings)[1] == "lr_init 0.01, lr_schedule cosine"
    runs = [config for configs in settings.values() for config in configs]
    assert len({deep_flags.run_name(config) for config in runs}) == 12
    assert {config.momentum for config in runs} == {0.0}
    assert {(c.lr_init, c.lr_schedule, c.seed) for c in runs} == {
        (lr, name, seed)
        for lr in (0.01, 0.05, 0.75)
        for name in ("constant", "cosine")
        for seed in (0, 1)
    }


def test_paired_lists_are_walked_together():
    flags = "--lr_init 0.002 0.05 --lr_schedule constant piecewise --paired --seed 3"
    settings = sweep_deep.expand(grid(*flags.split()))
    assert [(c.lr_init, c.lr_schedule, c.seed) for (c,) in settings.values()] == [
        (0.002, "constant", 3),
        (0.05, "piecewise", 3),
    ]
    unequal = grid(*flags.split(), "--batch_size", "1", "2", "3")
    with pytest.raises(ValueError, match=r"one length \(--batch_size 3, --lr_init 2"):
        sweep_deep.expand(unequal)


def test_what_no_name_tells_apart_gets_into_the_name():
    settings = sweep_deep.expand(grid("--momentum", "0.0", "0.9", "--exp_name", "m"))
    names = [deep_flags.run_name(config) for (config,) in settings.values()]
    assert [name.split("-cifar10")[0] for name in names] == ["m-momentum0.0", "m-momentum0.9"]


def test_every_flag_of_a_run_is_there_with_its_words(capsys):
    plain = grid()
    (configs,) = sweep_deep.expand(plain).values()
    assert configs == [deep_flags.Config()]
    with pytest.raises(SystemExit):
        grid("--help")
    text = capsys.readouterr().out
    assert "Heavy-ball momentum." in text and "--paired" in text


@pytest.fixture(scope="module")
def swept(small_cifar, tmp_path_factory):
    """A grid of which one run diverges, its output and its folder."""
    with pytest.MonkeyPatch.context() as patch, jax.enable_x64(False):
        patch.setitem(models.NETWORKS, "shallow", lambda **sizes: models.ResNet((1,), **sizes))
        chosen = replace(
            grid("--lr_init", "0.05", "3e38", "--lr_schedule", "constant"),
            model=("shallow",),
            model_width=(2,),
            batch_size=(16,),
            batch_size_eval=(32,),
            bn_images=(32,),
            epochs=(1,),
            data_dir=small_cifar,
            runs_dir=str(tmp_path_factory.mktemp("runs")),
        )
        yield chosen, sweep_deep.run(chosen)


def test_a_run_that_diverges_is_a_result(swept, capsys):
    chosen, folder = swept
    good, gone = json.loads((folder / "summary.json").read_text())["runs"]
    assert good["outcome"] == "finished" and good["last_row"]["step"] == 4
    assert "lower the step size" in gone["outcome"] and gone["last_row"]["step"] == 0
    assert {path.suffix for path in (folder / "figures").iterdir()} == {".png", ".pdf"}
    runs = folder.parent.parent / "resnet_cifar"
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.jsonl")}
    assert sweep_deep.run(chosen) == folder  # the same command: nothing is trained again
    out = capsys.readouterr().out
    assert "is at its last step, 4, already" in out and "has diverged before" in out
    assert "1 diverged" in out or "(1" in out
    assert before == {path: path.stat().st_mtime_ns for path in runs.rglob("*.jsonl")}


def test_a_run_that_was_cut_goes_on(swept, tmp_path):
    chosen, _folder = swept
    moved = replace(chosen, lr_init=(0.05,), runs_dir=str(tmp_path))
    ((config,),) = sweep_deep.expand(moved).values()
    whole = records.run_folder(*deep_flags.place_of(replace(config, runs_dir=chosen.runs_dir)))
    part = records.run_folder(*deep_flags.place_of(config))
    shutil.copytree(whole, part)
    shutil.rmtree(part / "checkpoints")  # as if cut before the first save
    sweep_deep.run(moved)
    last = lambda folder: records.read_rows(folder)[-1]["train/loss"]
    assert last(part) == last(whole)
    assert len(records.read_json(part / "manifest.json")["starts"]) == 2


def test_what_cannot_be_run_is_told_before_anything_is(swept, tmp_path):
    chosen, _ = swept
    for wrong, words in (
        ({"batch_size": (16, 72)}, "--batch_size is 72, more than the 64"),
        ({"lr_init": (0.1, -1.0)}, "--lr_init is -1.0"),
        ({"dataset": ("cifar10", "cifar12")}, "Unknown data set"),
    ):
        with pytest.raises(ValueError, match=words):
            sweep_deep.run(replace(chosen, runs_dir=str(tmp_path), **wrong))
    assert list(tmp_path.iterdir()) == []
