"""Curvature in this library and in PyTorch: eigenvalues and gauges of the same networks and data.

    taskset -c 1 python -m benchmarks.curvature --data_dir DIR --out curvature.json

All sides run on one core, in turn; times are those of the core, medians over rounds. (`taskset`
binds all libraries to it: one that starts two threads on one core is slower than one that starts
one.) `toy` and `mlp`: the largest eigenvalue of the Hessian to a relative residual of 1e-3, by
`measure.top_eigenpairs` and by power iteration over PyTorch's double backward, from random vectors
(cold), from the gradient, and from the eigenvector 20 steps of training earlier (warm). `resnet`:
the same once each, PyTorch's iteration from random vectors only, with at most `resnet_products`.
`gauges`: g^T H g / |g|^2 of 64 batches. SciPy's eigsh checks the eigenvalues, over curvlinops'
Hessian where it is installed, else over PyTorch's double backward.

The toy is an MLP 1-30-20-1 on 20 points, in float64. The MLP 3072-64-64-4 has the first 1,000
images of classes 0 to 3 of CIFAR-10, ResNet-18 the first 512 images and BatchNorm in training mode.
The loss is half the squared error, summed over outputs. `checkpoint` in the results tells how they
were trained: the toy and the MLP to the edge of stability, where eigenvalues crowd.
"""

import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
import torch

from benchmarks import curvature_problems as problems, curvature_torch as peer, timing
from benchmarks.curvature_problems import Problem
from experiments.launch import cli, devices
from sgd_sparse_jax import data, measure
from sgd_sparse_jax.types import Batch, Params

TOL, MOST = 1e-3, 1000  # relative residual; products at most
CLOCK = time.process_time  # on one core; the wall clock also counts what else runs there
CASES = ("toy", "mlp", "gauges", "resnet")


@dataclass(frozen=True)
class Config:
    """Times eigenvalues and gauges in this library and in PyTorch, on one core."""

    cases: tuple[Literal["toy", "mlp", "gauges", "resnet"], ...] = CASES
    """What to time."""
    rounds: int = 5
    """Number of timings of each side."""
    data_dir: str | None = None
    """Where CIFAR-10 is (default: TFDS_DATA_DIR, else ~/tensorflow_datasets)."""
    images: int = 1000
    """Images of the MLP."""
    steps: int = 600
    """Training steps of the MLP."""
    batches: int = 64
    """Batches of the gauges."""
    resnet_images: int = 512
    """Images of the ResNet."""
    resnet_width: int = 16
    """Width of the ResNet."""
    resnet_steps: int = 40
    """Training steps of the ResNet."""
    resnet_products: int = 30
    """Products of PyTorch's power iteration on the ResNet, at most."""
    oracle: bool = True
    """Whether SciPy's eigsh checks the eigenvalues."""
    out: Path | None = None
    """Where to write the JSON, after every case."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line, on one core."""
    if hasattr(os, "sched_getaffinity") and len(os.sched_getaffinity(0)) > 1:
        raise SystemExit("Bind the process to one core: taskset -c 1 python -m ...")
    cli.main(Config, run, argv)


def run(config: Config) -> dict[str, Any]:
    """Measures every case; prints tables and writes all results after each."""
    earlier = problems.EARLIER
    least = {"rounds": 1, "batches": 1, "images": 16, "steps": earlier, "resnet_steps": earlier}
    for name, value in least.items():
        if getattr(config, name) < value:
            raise ValueError(f"--{name} is {getattr(config, name)}; it must be {value} or more.")
    devices.set_up_deep(deterministic=False)
    jax.config.update("jax_enable_x64", True)  # for the toy; the arrays of the others are float32
    results: dict[str, Any] = {}
    for case in config.cases:
        results |= measured(case, config)
        packages = ("flax", "torch", "scipy")
        timing.write(config.out, command(config), packages, cases=results)
    return results


def measured(case: str, config: Config) -> dict[str, Any]:
    """Results of one case by name."""
    if case == "toy":
        return {case: eigenvalues(problems.chebyshev(), config)}
    images = data.load_images("cifar10", "train", data_dir=config.data_dir)
    if case == "resnet":
        size = (config.resnet_images, config.resnet_width, config.resnet_steps)
        resnet = problems.cifar_resnet(images, *size)
        return {case: eigenvalues(resnet, config, most=config.resnet_products, once=True)}
    mlp = problems.cifar_mlp(images, config.images, config.steps)
    if case == "mlp":
        return {case: eigenvalues(mlp, config)}
    return {
        "gauges, toy": gauges(problems.chebyshev(), config, size=4, passes=5),
        "gauges, mlp": gauges(mlp, config, size=16, vectorized=1),
    }


def command(config: Config) -> str:
    """The command line that runs `config` again, apart from the places of data and results."""
    left_out = ("cases", "data_dir", "oracle", "out")
    flags = [f"--{name} {value}" for name, value in vars(config).items() if name not in left_out]
    words = ["--cases", *config.cases, *flags, *([] if config.oracle else ["--no_oracle"])]
    return f"taskset -c 1 python -m benchmarks.curvature {' '.join(words)}"


def eigenvalues(
    problem: Problem, config: Config, *, most: int = MOST, once: bool = False
) -> dict[str, Any]:
    """The largest eigenvalue on all sides, and the time of a product; `once`: see the top."""
    print(f"-- {problem.checkpoint}", flush=True)
    found: dict[str, peer.Found] = {}

    def find(params: Params, start: Params | None) -> measure.Eigenpairs:
        at = (params, problem.stats, problem.batch)
        operator = measure.hessian(problem.objective, *at, linearize=True)
        how = {"tol": TOL, "max_matvecs": MOST, "start": start}
        return measure.top_eigenpairs(operator, 1, jr.key(1), **how)

    earlier = find(problem.earlier, None).vectors
    torch.manual_seed(0)
    random = [torch.randn_like(p) for p in problem.net.parameters()]
    known = peer.vector(jax.tree.map(lambda leaf: leaf[0], earlier))
    inputs, descend = problem.tensors(), jax.jit(jax.grad(problem.objective, has_aux=True))

    def by_jax(name: str, start: Params | None = None, *, descent: bool = False) -> None:
        if descent:
            gradient = descend(problem.params, problem.stats, problem.batch)[0]
            start = jax.tree.map(lambda leaf: leaf[None], gradient)
        pairs = find(problem.params, start)
        value, residual = float(pairs.values[0]), float(pairs.residuals[0])
        found[name] = peer.Found(value, residual, pairs.matvecs)

    def by_torch(name: str, start: peer.Vector | None) -> None:
        hessian = peer.Hessian(problem.net, *inputs)
        start = [each.detach() for each in hessian.gradient] if start is None else start
        found[name] = peer.power_iteration(hessian, start, tol=TOL, most=most)

    runs = {
        "PyTorch, cold": partial(by_torch, start=random),
        "PyTorch, from the gradient": partial(by_torch, start=None),
        "PyTorch, warm": partial(by_torch, start=known),
        "this library, cold": by_jax,
        "this library, from the gradient": partial(by_jax, descent=True),
        "this library, warm": partial(by_jax, start=earlier),
    }
    runs = {name: partial(run, name) for name, run in runs.items()}
    first = timed("PyTorch, cold", runs)
    if once:
        descend(problem.params, problem.stats, problem.batch)  # compiles
        seconds = {name: timed(name, runs) for name in runs if "PyTorch" not in name}
        table = {name: {"us_per_eigenvalue": 1e6 * s} for name, s in seconds.items()}
    else:
        sides = {n: (run, 1) for n, run in runs.items()}
        table = timing.compare(sides, config.rounds, unit="eigenvalue", clock=CLOCK)
    result: dict[str, Any] = {
        "checkpoint": problem.checkpoint,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(problem.params)),
        "examples": len(problem.batch.x),
        "first_pytorch_run_s": first,
        "eigenvalue": table,
        "product": products(problem, random, *((1, 1) if once else (config.rounds, 5))),
    }
    if config.oracle:
        name, found_by = peer.oracle(problem.net, *inputs)
        found[name] = found_by
    values = [each.value for each in found.values()]
    result["found"] = {name: each._asdict() for name, each in found.items()}
    result["relative_difference"] = (max(values) - min(values)) / abs(values[0])
    for name, each in found.items():
        print(
            f"{name:40s} {each.value:.7g}, residual {each.residual:.1e}, {each.products} products"
        )
    return result


def timed(name: str, runs: dict[str, Callable[[], None]]) -> float:
    """Seconds of one run."""
    begin = CLOCK()
    runs[name]()
    seconds = CLOCK() - begin
    print(f"{name:40s} {seconds:10.3f} s", flush=True)
    return seconds


def products(problem: Problem, v: peer.Vector, rounds: int, count: int) -> dict[str, dict]:
    """Time of `count` products with the Hessian, and their agreement."""
    hessian = peer.Hessian(problem.net, *problem.tensors())
    given = (problem.params, problem.stats, problem.batch)
    operator = measure.hessian(problem.objective, *given)
    linear = measure.hessian(problem.objective, *given, linearize=True)
    w = jax.tree.map(jnp.ones_like, problem.params)
    by_jax = lambda of: jax.block_until_ready([of.matvec(w) for _ in range(count)])
    sides = {
        "PyTorch": (lambda: [hessian(v) for _ in range(count)], count),
        "this library": (lambda: by_jax(operator), count),
        "this library, linearized": (lambda: by_jax(linear), count),
    }
    return timing.compare(sides, rounds, unit="product", clock=CLOCK)


def gauges(
    problem: Problem, config: Config, *, size: int, vectorized: int | None = None, passes: int = 1
) -> dict[str, Any]:
    """g^T H g / |g|^2 of batches of `size` on all sides, each `passes` times in turn."""
    print(f"-- gauges: {problem.checkpoint}, {config.batches} batches of {size}", flush=True)
    rng, n = np.random.default_rng(0), len(problem.batch.x)
    rows = np.stack([rng.permutation(n)[:size] for _ in range(config.batches)])
    batches = Batch(problem.batch.x[rows], problem.batch.y[rows])
    each = [Batch(x, y) for x, y in zip(batches.x, batches.y, strict=True)]
    xs, ys = (torch.tensor(np.array(leaf)) for leaf in batches)
    found: dict[str, float] = {}

    @jax.jit
    def one(params: Params, batch: Batch) -> tuple[Any, Any]:
        slope = jax.grad(lambda params: problem.objective(params, problem.stats, batch)[0])
        g, Hg = jax.jvp(slope, (params,), (slope(params),))
        return optax.tree.vdot(g, Hg), optax.tree.vdot(g, g)

    def loop() -> None:
        pairs = [tuple(map(float, one(problem.params, batch))) for batch in each]
        found["loop of compiled products"] = statistics.fmean(gHg / g2 for gHg, g2 in pairs)

    def by_torch() -> None:
        found["PyTorch"] = statistics.fmean(peer.step_sharpness(problem.net, xs, ys))

    def by_jax() -> None:
        given = (problem.objective, problem.params, problem.stats, batches)
        how = {"chunk": config.batches, "vectorized": vectorized}
        gauge = measure.batch_gauges(*given, **how)["batch_sharpness"]
        found["this library"] = gauge.value

    sides = {"loop of compiled products": loop, "PyTorch": by_torch, "this library": by_jax}
    repeated = lambda side: lambda: [side() for _ in range(passes)]
    units = passes * config.batches
    counted = {name: (repeated(side), units) for name, side in sides.items()}
    table = timing.compare(counted, config.rounds, unit="batch", clock=CLOCK)
    spread = max(found.values()) - min(found.values())
    about = {"checkpoint": problem.checkpoint, "batch_size": size, "batch_sharpness": found}
    return about | {"batch": table, "relative_difference": spread / abs(found["PyTorch"])}


if __name__ == "__main__":
    main()
