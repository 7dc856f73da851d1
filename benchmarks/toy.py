"""Diagonal-net SGD (D1's sizes, float64): a NumPy loop, a numba loop and ours, in turn.

    python -m benchmarks.toy --out benchmarks/results/toy.json

The two ends are what the field runs (a NumPy loop over mini-batches; beside it the shortest one,
which knows that b = 1) and a compiled scalar loop over all cores.
Each round times every side once; the table shows medians over rounds of microseconds per step
and run, and the median of the ratios taken round by round.
"""

import argparse
import json
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import jax
import jax.numpy as jnp
import jax.random as jr
import numba
import numpy as np
import optax

from sgd_sparse_jax._types import Batch
from sgd_sparse_jax.data import sparse_regression
from sgd_sparse_jax.models import DiagonalNet
from sgd_sparse_jax.train import (
    Gauge,
    half_squared,
    init_state,
    make_segment,
    make_step,
    make_sweep,
    record_run,
    with_replacement,
)

STEP_SIZE, INIT_SCALE = 0.25, 0.1


def numpy_side(problem, steps: int, batch: int = 1):
    """One run for any batch size, as the equations are; draws its batches like ours does."""
    x, y = problem.train

    def side():
        rng = np.random.RandomState(1)
        u, v = np.full(x.shape[1], INIT_SCALE), np.zeros(x.shape[1])
        for _ in range(steps):
            idx = rng.randint(0, len(y), size=batch)
            gradient = x[idx].T @ (x[idx] @ (u * v) - y[idx]) / batch
            u, v = u - STEP_SIZE * gradient * v, v - STEP_SIZE * gradient * u
        return u

    return side


def numpy_single_side(problem, steps: int):
    """One run of single-example steps, with the order drawn beforehand and not timed."""
    x, y = problem.train
    order = np.random.RandomState(1).randint(0, len(y), size=steps)

    def side():
        u, v = np.full(x.shape[1], INIT_SCALE), np.zeros(x.shape[1])
        for i in order:
            gradient = (x[i] @ (u * v) - y[i]) * x[i]
            u, v = u - STEP_SIZE * gradient * v, v - STEP_SIZE * gradient * u
        return u

    return side


@numba.njit(parallel=True, fastmath=True)
def numba_runs(x, y, order, step_size, init_scale):
    """All runs, one per thread at a time, compiled to machine code."""
    runs, steps = order.shape
    d = x.shape[1]
    out = np.empty((runs, d))
    for r in numba.prange(runs):
        u, v = np.full(d, init_scale), np.zeros(d)
        for t in range(steps):
            row = x[order[r, t]]
            residual = -y[order[r, t]]
            for j in range(d):
                residual += row[j] * u[j] * v[j]
            for j in range(d):
                gradient = step_size * residual * row[j]
                u[j], v[j] = u[j] - gradient * v[j], v[j] - gradient * u[j]
        out[r] = u
    return out


def numba_side(problem, steps: int, runs: int):
    """The same runs in a compiled loop over all cores; drawing the order isn't timed."""
    x, y = problem.train
    order = np.random.RandomState(1).randint(0, len(y), size=(runs, steps)).astype(np.int32)
    return lambda: numba_runs(x, y, order, STEP_SIZE, INIT_SCALE)


def our_side(problem, steps: int, runs: int):
    """The generic path: linen, autodiff, optax; draws its own order."""
    train = jax.tree.map(jnp.asarray, problem.train)
    model = DiagonalNet(INIT_SCALE)

    def run(key, step_size):
        tx = optax.sgd(step_size)
        fetch = lambda key, idx: Batch(train.x[idx], train.y[idx])
        segment = make_segment(make_step(model, half_squared, tx), fetch)
        sampler = with_replacement(len(train.y), 1)
        start = Gauge(lambda state: state.step, [0])
        state = init_state(key, model, tx, train.x)
        return record_run(key, sampler, segment, state, [start], steps)[0].params["u"]

    sweep = make_sweep(run)
    keys, points = jr.split(jr.key(0), runs), jnp.array([STEP_SIZE])
    return lambda: sweep(keys, points)


def rounds(sides: dict, repeats: int) -> dict[str, list[float]]:
    """Seconds of each side in each round; a first, uncounted round compiles."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            start = time.perf_counter()
            side()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def main() -> None:
    """Times all sides and prints a table; `--out` also writes it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=128, help="runs in the ensembles")
    parser.add_argument("--steps", type=int, default=100_001, help="SGD steps of a run")
    parser.add_argument("--repeats", type=int, default=5, help="rounds that count")
    parser.add_argument("--out", type=Path, default=None, help="where to write the JSON")
    args = parser.parse_args()
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    jax.config.update("jax_enable_x64", True)

    problem = sparse_regression(0)
    short = max(args.steps // 10, 1)  # the NumPy loop is long enough at a tenth
    counted = {  # side -> (callable, steps x runs)
        "numpy, one run": (numpy_side(problem, short), short),
        "numpy, one run, b = 1 only": (numpy_single_side(problem, short), short),
        "numba, ensemble, all cores": (
            numba_side(problem, args.steps, args.runs),
            args.steps * args.runs,
        ),
        "ours, one run": (our_side(problem, args.steps, 1), args.steps),
        "ours, ensemble": (our_side(problem, args.steps, args.runs), args.steps * args.runs),
    }
    seconds = rounds({name: side for name, (side, _) in counted.items()}, args.repeats)
    micros = {n: [1e6 * s / counted[n][1] for s in seconds[n]] for n in counted}
    table = {
        name: {
            "us_per_step_and_run": statistics.median(us),
            "times_faster_than_numpy": statistics.median(
                base / mine for base, mine in zip(micros["numpy, one run"], us, strict=True)
            ),
            "rounds_us": us,
        }
        for name, us in micros.items()
    }
    for name, row in table.items():
        print(
            f"{name:28s} {row['us_per_step_and_run']:8.3f} us per step and run  "
            f"{row['times_faster_than_numpy']:7.1f} x the NumPy loop"
        )
    if args.out:
        result = {
            "command": f"python -m benchmarks.toy --runs {args.runs} --steps {args.steps} "
            f"--repeats {args.repeats}",
            "devices": [str(device) for device in jax.devices()],
            "cpu_count": os.cpu_count(),
            "machine": platform.machine(),
            "versions": {name: version(name) for name in ("jax", "jaxlib", "numpy", "numba")},
            "sides": table,
        }
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
