"""The deep benchmark: both sides are the same networks, and its numbers are numbers."""

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

from benchmarks import deep, deep_plan, deep_sides, peaks
from sgd_sparse_jax import models

ROOT = Path(__file__).parents[1]
SMALL = {"resnet18_plain": 4, "wrn28": 1, "densenet100_12": 2}
TINY = ("--width=2", "--batch_size=8", "--images=16", "--eval_images=8", "--steps=1", "--rounds=1")


@pytest.fixture
def small_peaks(monkeypatch):
    monkeypatch.setattr(peaks, "sizes", lambda: (64, 2**16))


@pytest.fixture
def no_torch(monkeypatch):
    found = util.find_spec
    monkeypatch.setattr(
        deep_plan, "find_spec", lambda name: None if name == "torch" else found(name)
    )


def our_shapes(name, width=None):
    """Of all parameters, kernels as torch stores them, outputs first."""
    model = models.build(name, classes=10, width=width)
    x = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
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


@pytest.mark.parametrize("name", deep_plan.TORCH_NETS)
@pytest.mark.parametrize("small", [False, True])
def test_both_sides_train_parameters_of_the_same_shapes(name, small):
    pytest.importorskip("torch")
    from benchmarks import torch_nets

    width = SMALL[name] if small else None
    net = torch_nets.NETWORKS[name](10, **({"width": width} if small else {}))
    shapes = our_shapes(name, width)
    assert sorted(tuple(p.shape) for p in net.parameters()) == shapes
    assert torch_nets.parameters(net) == sum(map(math.prod, shapes))


@pytest.mark.filterwarnings("default")  # torch's own
@pytest.mark.parametrize("name", deep_plan.TORCH_NETS)
def test_operations_by_formula_are_those_that_torch_counts_on_its_side(name):
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks import torch_nets

    net = torch_nets.NETWORKS[name](10, width=SMALL[name])
    with FlopCounterMode(display=False) as counter:
        net(torch.zeros(2, 3, 32, 32)).sum().backward()
    model = models.build(name, classes=10, width=SMALL[name])
    assert peaks.step_flop(model, (2, 32, 32, 3)) == counter.get_total_flops()


def test_torch_crops_are_windows_of_the_padded_image_and_half_are_mirrored():
    torch = pytest.importorskip("torch")
    from benchmarks import torch_nets

    image = np.arange(1, 6 * 6 * 3 + 1, dtype=np.uint8).reshape(6, 6, 3)
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    windows = [padded[i : i + 6, j : j + 6] for i in range(9) for j in range(9)]
    plain = {window.tobytes() for window in windows if window.any(axis=(0, 2)).sum() > 1}
    torch.manual_seed(0)
    crops = torch_nets.crop_and_flip(torch.from_numpy(np.tile(image, (2000, 1, 1, 1)))).numpy()
    known = {window.tobytes() for window in windows}
    straight = [crop.tobytes() in known for crop in crops]
    assert all(
        is_straight or np.ascontiguousarray(crop[:, ::-1]).tobytes() in known
        for crop, is_straight in zip(crops, straight, strict=True)
    )
    assert {crop.tobytes() for crop in crops} >= plain
    assert 0.4 < np.mean(straight) < 0.6


@pytest.mark.usefixtures("small_peaks", "no_torch")
def test_a_tiny_run_without_torch_writes_positive_numbers_and_says_so(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setitem(models.NETWORKS, "one_block", partial(models.ResNet, (1,)))  # soon compiled
    out = tmp_path / "deep.json"
    deep.main(["--nets", "one_block", "--precision", "fp32", *TINY, "--out", str(out)])
    results = json.loads(out.read_text())
    assert "PyTorch is not installed" in results["no_torch"]
    assert "JAX only: PyTorch is not installed" in capsys.readouterr().out
    net = results["nets"]["one_block"]
    assert list(net["sides"]) == ["JAX, 1 per call"]
    assert net["parameters"] == sum(map(math.prod, our_shapes("one_block", 2)))
    assert net["epoch"]["steps"] == 2
    assert all(math.isfinite(number) and number > 0 for number in numbers(results))
    assert len(numbers(net)) > 15


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("name", deep_plan.TORCH_NETS)
def test_the_torch_side_learns_a_few_images_by_heart(name, bf16):
    torch = pytest.importorskip("torch")
    from benchmarks import torch_nets

    torch.set_num_threads(1)  # more wait for each other where cores are busy
    torch.manual_seed(0)
    images = torch.randint(0, 256, (4, 8, 8, 3), dtype=torch.uint8)
    images //= torch.arange(1, 5, dtype=torch.uint8)[:, None, None, None]  # told by brightness
    steps = torch_nets.trainer(
        torch_nets.NETWORKS[name](4, width=SMALL[name]),
        images,
        torch.arange(4),
        batch=16,
        bf16=bf16,
        mode="eager",
        lr=0.05,
        momentum=0.9,
        l2=5e-4,
        average_decay=0.99,
    )
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
    assert run.stdout.count("torch, eager: first") == 1
    ours, theirs = net["sides"].values()
    ratio = ours["flop_per_s"] / theirs["flop_per_s"]
    assert ratio == pytest.approx(theirs["ms_per_step"] / ours["ms_per_step"])


@pytest.mark.filterwarnings("default")  # torch's own
def test_a_mode_that_fails_gives_way_to_eager_and_its_reason_is_kept(monkeypatch):
    def side(name, mode, plan):
        if mode != "eager":
            raise RuntimeError(f"no {mode}\nand a page about it")
        return deep_sides.Side(lambda: None, 1, 1, {})

    monkeypatch.setattr(deep_sides, "torch_side", side)
    plan = deep_plan.complete(deep_plan.Config(batch_size=8, images=8, eval_images=1))
    plan = plan._replace(no_torch="", torch_modes=("default", "max-autotune"))
    sides, failed = deep_sides.torch_sides("wrn28", plan)
    assert list(sides) == ["torch, eager"]
    assert failed == {
        "default": "RuntimeError: no default",
        "max-autotune": "RuntimeError: no max-autotune",
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--nets resnet19", "Unknown model 'resnet19'"),
        ("--batch_size 12", "--batch_size is 12, which can't be split over 8 devices"),
        ("--rounds 0", "--rounds is 0"),
        ("--images 8 --batch_size 16", "--images is 8; it must be 16 or more"),
        ("--torch_modes fastest", "Unknown --torch_modes fastest"),
        ("--torch_modes eager", "PyTorch is not installed"),
        ("--steps_per_call 0", "--steps_per_call"),
    ],
)
@pytest.mark.usefixtures("no_torch")
def test_what_cannot_be_run_is_said_in_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        deep.main(flags.split())
    assert stop.value.code == 1
    err = capsys.readouterr().err
    assert words in err
    assert err.startswith("error: ")
    assert err.count("\n") == 1


def test_the_command_written_into_results_gives_the_same_run():
    from experiments.launch import cli

    config = deep_plan.Config(
        nets=("wrn28",), width=2, steps_per_call=(1, 5), torch_modes=("eager",)
    )
    assert cli.parse(deep_plan.Config, deep_plan.command(config).split()[3:]) == config
