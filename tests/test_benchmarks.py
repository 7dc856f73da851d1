"""Benchmarks: both sides are the same networks, and recorded commands can be run again."""

import dataclasses
import json
import math
import subprocess
import sys
from functools import partial
from importlib import util
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest

from benchmarks import accelerator, deep, deep_plan, overheads, peaks, train_paper
from experiments.deep.config import Config as Flags
from experiments.launch import cli
from sgd_sparse_jax import models

ROOT = Path(__file__).parents[1]
SMALL = {"resnet18_plain": 4, "wrn28": 1, "densenet100_12": 2}
TINY = ("--width=2", "--batch_size=8", "--images=16", "--eval_images=8", "--steps=1", "--rounds=1")


@pytest.fixture
def no_torch(monkeypatch):
    monkeypatch.setattr(
        deep_plan, "find_spec", lambda name: None if name == "torch" else util.find_spec(name)
    )


def shapes_of(name, width=None):
    """Shapes of all parameters, kernels as torch stores them, outputs first."""
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    model = models.build(name, classes=10, width=width)
    params = jax.eval_shape(model.init, jr.key(0), x)["params"]
    return sorted(
        (p.shape[-1:] + p.shape[-2:-1] + p.shape[:-2]) if p.ndim > 1 else p.shape
        for p in jax.tree.leaves(params)
    )


def numbers(tree):
    """Every number in a JSON tree."""
    if isinstance(tree, dict | list):
        children = tree.values() if isinstance(tree, dict) else tree
        return [number for child in children for number in numbers(child)]
    return [tree] if isinstance(tree, int | float) else []


@pytest.mark.filterwarnings("default")  # torch's own
@pytest.mark.parametrize("name", deep_plan.TORCH_NETS)
def test_both_sides_have_parameters_of_the_same_shapes_and_count_the_same_operations(name):
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks import torch_nets

    full = torch_nets.NETWORKS[name](10)
    assert sorted(tuple(p.shape) for p in full.parameters()) == shapes_of(name)
    net = torch_nets.NETWORKS[name](10, width=SMALL[name])
    assert sorted(tuple(p.shape) for p in net.parameters()) == shapes_of(name, SMALL[name])
    assert torch_nets.parameters(net) == sum(map(math.prod, shapes_of(name, SMALL[name])))
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(2, 3, 32, 32)).sum().backward()
    model = models.build(name, classes=10, width=SMALL[name])
    assert peaks.step_flop(model, (2, 32, 32, 3)) == counter.get_total_flops()


def test_torch_crops_are_windows_of_the_padded_image_and_half_are_mirrored():
    torch = pytest.importorskip("torch")
    from benchmarks import torch_nets

    image = np.arange(1, 6 * 6 * 3 + 1, dtype=np.uint8).reshape(6, 6, 3)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    windows = {padded[i : i + 6, j : j + 6].tobytes() for i in range(9) for j in range(9)}
    torch.manual_seed(0)
    crops = torch_nets.crop_and_flip(torch.from_numpy(np.tile(image, (2000, 1, 1, 1)))).numpy()
    straight = np.array([crop.tobytes() in windows for crop in crops])
    mirrored = [np.ascontiguousarray(crop[:, ::-1]).tobytes() for crop in crops[~straight]]
    assert set(mirrored) <= windows
    assert len({crop.tobytes() for crop in crops[straight]}) > 70
    assert 0.4 < straight.mean() < 0.6


@pytest.mark.usefixtures("no_torch")
def test_a_tiny_run_without_torch_writes_positive_numbers(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peaks, "sizes", lambda: (64, 2**16))
    monkeypatch.setitem(models.NETWORKS, "one_block", partial(models.ResNet, (1,)))  # small
    out = tmp_path / "deep.json"
    deep.main(["--nets", "one_block", "--precision", "fp32", *TINY, "--out", str(out)])
    results = json.loads(out.read_text())
    assert "PyTorch is not installed" in results["no_torch"]
    assert "PyTorch is not installed" in capsys.readouterr().out
    net = results["nets"]["one_block"]
    assert list(net["sides"]) == ["JAX, 1 per call"]
    assert net["parameters"] == sum(map(math.prod, shapes_of("one_block", 2)))
    assert all(math.isfinite(number) and number > 0 for number in numbers(results))
    assert len(numbers(net)) > 15


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", deep_plan.TORCH_NETS)
def test_the_torch_side_fits_a_few_images(name, bf16):
    torch = pytest.importorskip("torch")
    from benchmarks import torch_nets

    torch.set_num_threads(1)  # more threads wait for each other where cores are busy
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    images //= torch.arange(1, 5, dtype=torch.uint8)[:, None, None, None]  # classes by brightness
    net = torch_nets.NETWORKS[name](4, width=SMALL[name])
    options = {"lr": 0.05, "momentum": 0.9, "l2": 5e-4, "average_decay": 0.99, "mode": "eager"}
    steps = torch_nets.trainer(net, images, torch.arange(4), batch=16, bf16=bf16, **options)
    first, last = float(steps(1)), float(steps(20))
    assert last < 0.7 * first


@pytest.mark.slow
def test_both_sides_of_a_network_run_from_the_command_line(tmp_path):
    pytest.importorskip("torch")
    out = tmp_path / "deep.json"
    argv = ["-m", "benchmarks.deep", "--nets", "resnet18_plain", "--precision", "bf16", *TINY]
    run = subprocess.run(
        [sys.executable, *argv, "--out", str(out)], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    net = json.loads(out.read_text())["nets"]["resnet18_plain"]
    assert list(net["sides"]) == ["JAX, 1 per call", "torch, eager"]
    assert not net["torch_failed"]
    jax_side, torch_side = net["sides"].values()
    ratio = jax_side["flop_per_s"] / torch_side["flop_per_s"]
    assert ratio == pytest.approx(torch_side["ms_per_step"] / jax_side["ms_per_step"])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # torch's own
def test_all_sides_find_one_curvature(tmp_path, small_cifar):
    pytest.importorskip("torch")
    from benchmarks import curvature

    sizes = {"images": 16, "steps": 20, "batches": 2, "resnet_images": 8, "resnet_width": 2}
    sizes |= {"rounds": 1, "resnet_steps": 20, "oracle": False, "resnet_products": 1000}
    out = tmp_path / "curvature.json"
    curvature.run(curvature.Config(**sizes, data_dir=small_cifar, out=out))
    cases = json.loads(out.read_text())["cases"]
    assert list(cases) == ["toy", "mlp", "gauges, toy", "gauges, mlp", "resnet"]
    for name, case in cases.items():
        # float32; eigenvalues to residuals of 1e-3, where those of the ResNet crowd
        # In float32, small gradients near a minimum have few digits.
        bound = {"resnet": 5e-3, "gauges, mlp": 1e-3}.get(name, 1e-4)
        assert case["relative_difference"] < bound, name
    sides = cases["mlp"]["found"]
    assert sides["this library, cold"]["products"] <= sides["PyTorch, cold"]["products"]
    assert max(side["residual"] for side in sides.values()) <= curvature.TOL


@pytest.mark.slow
def test_the_cost_of_a_save_is_a_share_of_the_time_between_saves(tmp_path):
    out = tmp_path / "overheads.json"
    tiny = ("--net=resnet_tiny", "--width=2", "--batch_size=8", "--steps=8", "--rounds=2")
    overheads.main([*tiny, f"--out={out}"])
    found = json.loads(out.read_text())
    assert all(len(each) == 2 for each in found["rounds"].values())
    assert min(found["save_alone_s"], found["save_keeps_the_loop_s"], found["ms_per_step"]) > 0
    cost = max(found["save_keeps_the_loop_s"], found["save_lengthens_the_run_s"])
    assert found["share_of_a_run"] == pytest.approx(cost / Flags.save_every_seconds)


def test_the_pallas_kernel_takes_the_steps_of_the_plain_program():
    keys = jax.random.split(jax.random.key(1), 3)
    plain = jax.jit(lambda keys: accelerator.toy_program(70, keys))(keys)
    kernel = accelerator.pallas_program(70, keys, interpret=True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10), plain, kernel)


@pytest.mark.slow
@pytest.mark.usefixtures("no_torch")
def test_the_accelerator_benchmark_runs_at_small_size(tmp_path, small_cifar, monkeypatch):
    monkeypatch.setattr(peaks, "sizes", lambda: (64, 2**16))
    out = tmp_path / "all.json"
    tiny = ("--nets=resnet_tiny", "--precisions=fp32", "--rounds=1", "--eval_images=8")
    toys = ("--most_runs=16", "--toy_steps=8", f"--out={out}")
    accelerator.main([*tiny, *toys, "--width=2", "--batch_size=8", "--images=16"])
    found = json.loads(out.read_text())
    assert list(found["toy_seconds_by_runs"]["XLA"]) == ["1", "4", "16"]
    assert found["deep"]["fp32"]["nets"] and out.with_suffix(".png").exists()


@pytest.mark.slow
def test_the_papers_four_settings_are_trained_within_the_time(tmp_path, small_cifar, monkeypatch):
    for name, setting in train_paper.SETTINGS.items():
        small = {"model": "resnet_tiny", "batch_size": 16, "batch_size_eval": 16}
        monkeypatch.setitem(train_paper.SETTINGS, name, dataclasses.replace(setting, **small))
    monkeypatch.setattr(train_paper, "IMAGES", 64)
    monkeypatch.setattr(train_paper, "PAPER_EPOCHS", 40)
    argv = [f"--data_dir={small_cifar}", f"--out_dir={tmp_path}", "--model_width=2"]
    with jax.enable_x64(False):
        train_paper.main([*argv, "--seconds=1e6"])
    outcomes = json.loads((tmp_path / "summary.json").read_text())["runs"]
    assert [run["outcome"] for run in outcomes] == ["finished"] * 4
    assert all(run["last_row"]["epoch"] == 40 for run in outcomes)


@pytest.mark.parametrize(
    ("benchmark", "flags", "words"),
    [
        (deep, "--nets resnet19", "resnet19"),
        (deep, "--batch_size 12", "--batch_size"),
        (deep, "--rounds 0", "--rounds"),
        (deep, "--images 8 --batch_size 16", "--images"),
        (deep, "--torch_modes fastest", "--torch_modes"),
        (deep, "--torch_modes eager", "PyTorch is not installed"),
        (deep, "--steps_per_call 0", "--steps_per_call"),
        (overheads, "--net=resnet_tiny --steps=3", "4 or more"),
    ],
)
@pytest.mark.usefixtures("no_torch")
def test_invalid_flags_are_an_error_in_one_line(benchmark, flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(flags.split())
    err = capsys.readouterr().err
    assert stop.value.code == 1
    assert words in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("benchmark", "config"),
    [
        (deep_plan, deep_plan.Config(nets=("wrn28",), width=2, steps_per_call=(1, 5))),
        (overheads, overheads.Config(net="wrn28", width=1, steps=8, rounds=2)),
    ],
)
def test_the_recorded_command_parses_to_the_same_config(benchmark, config):
    words = benchmark.command(config).split()[3:]
    assert cli.parse(type(config), words) == config
