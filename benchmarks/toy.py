"""Toy networks: common training loops and this library's sweeps (the paper's sizes, float64).

    python -m benchmarks.toy --out benchmarks/results/toy.json

Diagonal networks (D1): a NumPy loop over mini-batches, the shortest NumPy loop (for b = 1 only), a
numba loop over all cores, JAX. Fully connected networks (F1, T1, T3): a PyTorch loop on one thread
(more threads are slower), JAX. Jacobian ranks of D1's records: NumPy's SVD of [X*u, X*v], JAX. Each
round times every side once; numbers are medians over rounds, ratios are taken round by round.
"""

import os

# Before JAX and NumPy are imported: several XLA devices share the cores.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import jax
import jax.numpy as jnp
import jax.random as jr
import numba
import numpy as np
import torch

from benchmarks import timing
from benchmarks.toy_runs import make_run
from experiments.launch import devices
from experiments.toy import problems
from sgd_sparse_jax import measure
from sgd_sparse_jax.train import Probe, make_sweep

DIAGONAL_STEP_SIZE, FC_STEP_SIZE = 0.25, 1e-4
INIT_SCALE = 0.1


def numpy_side(toy: problems.Toy, steps: int, batch: int = 1):
    """One run for any batch size, written as the equations; drawing batches is timed."""
    x, y = np.asarray(toy.train.x), np.asarray(toy.train.y)

    def side():
        rng = np.random.RandomState(1)
        u, v = np.full(x.shape[1], INIT_SCALE), np.zeros(x.shape[1])
        for _ in range(steps):
            idx = rng.randint(0, len(y), size=batch)
            gradient = x[idx].T @ (x[idx] @ (u * v) - y[idx]) / batch
            u, v = u - DIAGONAL_STEP_SIZE * gradient * v, v - DIAGONAL_STEP_SIZE * gradient * u
        return u

    return side


def numpy_single_side(toy: problems.Toy, steps: int):
    """One run of single-example steps; drawing the order is not timed."""
    x, y = np.asarray(toy.train.x), np.asarray(toy.train.y)
    order = np.random.RandomState(1).randint(0, len(y), size=steps)

    def side():
        u, v = np.full(x.shape[1], INIT_SCALE), np.zeros(x.shape[1])
        for i in order:
            gradient = (x[i] @ (u * v) - y[i]) * x[i]
            u, v = u - DIAGONAL_STEP_SIZE * gradient * v, v - DIAGONAL_STEP_SIZE * gradient * u
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


def numba_side(toy: problems.Toy, steps: int, runs: int):
    """`runs` runs in a compiled loop over all cores; drawing the order isn't timed."""
    x, y = np.asarray(toy.train.x), np.asarray(toy.train.y)
    order = np.random.RandomState(1).randint(0, len(y), size=(runs, steps)).astype(np.int32)
    return lambda: numba_runs(x, y, order, DIAGONAL_STEP_SIZE, INIT_SCALE)


def torch_side(toy: problems.Toy, steps: int):
    """One run of a torch.nn net with the widths, biases and data of `toy`."""
    params = toy.network(1.0).init(jr.key(0), toy.train.x)[0]
    layers: list[torch.nn.Module] = []
    for layer in params.values():
        linear = torch.nn.Linear(*layer["kernel"].shape, bias="bias" in layer, dtype=torch.float64)
        layers += [linear, torch.nn.ReLU()]
    net = torch.nn.Sequential(*layers[:-1])
    x = torch.from_numpy(np.array(toy.train.x))
    y = torch.from_numpy(np.array(toy.train.y))[:, None]
    optimizer = torch.optim.SGD(net.parameters(), lr=FC_STEP_SIZE)

    def side():
        for _ in range(steps):
            idx = torch.from_numpy(np.random.choice(len(y), size=1, replace=False))
            loss = ((net(x[idx]) - y[idx]) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return side


def jax_side(toy: problems.Toy, steps: int, runs: int, step_size: float):
    """`runs` seeds of one step size, as a user would write it; drawing the order is timed."""
    return sweep_side(toy, steps, runs, jnp.array([step_size]))


def sweep_side(toy: problems.Toy, steps: int, seeds: int, step_sizes: jax.Array):
    """Seeds x step sizes, final parameters."""
    run = make_run(toy, steps, [Probe(lambda state: state.step, [0])])
    of_run = lambda key, step_size: run(key, step_size)[0].params
    sweep = make_sweep(of_run, **toy.sweep_options)
    keys = jr.split(jr.key(0), seeds)
    return lambda: sweep(keys, step_sizes)


def diagonal_net_sides(steps: int, runs: int) -> dict:
    """Diagonal nets: (callable, steps x runs) by name."""
    toy = problems.PROBLEMS["diagonal"]()
    short = max(steps // 10, 1)  # the NumPy loops are long enough at a tenth
    jax_runs = lambda runs: jax_side(toy, steps, runs, DIAGONAL_STEP_SIZE)
    return {
        "NumPy loop over mini-batches, one run": (numpy_side(toy, short), short),
        "NumPy loop for b = 1 only, one run": (numpy_single_side(toy, short), short),
        "JAX, one run": (jax_runs(1), steps),
        f"JAX, {runs} runs": (jax_runs(runs), steps * runs),
        f"numba loop on all cores, {runs} runs": (numba_side(toy, steps, runs), steps * runs),
    }


def fully_connected_sides(name: str, steps: int, runs: int) -> dict:
    """Fully connected nets: (callable, steps x runs) by name."""
    toy = problems.PROBLEMS[name]()
    short = max(steps // 50, 1)
    jax_runs = lambda runs: jax_side(toy, steps, runs, FC_STEP_SIZE)
    return {
        "PyTorch loop, one run": (torch_side(toy, short), short),
        "JAX, one run": (jax_runs(1), steps),
        f"JAX, {runs} runs": (jax_runs(runs), steps * runs),
    }


def rank_sides(count: int) -> dict:
    """Ranks of D1's Jacobian at `count` points: (callable, matrices) by name."""
    toy = problems.PROBLEMS["diagonal"]()
    x = np.asarray(toy.test.x[: 2 * toy.train.x.shape[1]])
    rng = np.random.RandomState(0)
    sizes = 10.0 ** rng.uniform(-9, 0, (count, 1, x.shape[1]))
    uv = sizes * rng.randn(count, 2, x.shape[1])
    few = max(count // 10, 1)

    def numpy_ranks():
        for u, v in uv[:few]:
            s = np.linalg.svd(np.hstack([x * u, x * v]))[1]
            (s > 1e-15 * s[0]).sum()

    def of_one(key, uv):
        return toy.spectra({"u": uv[0], "v": uv[1]})

    sweep, keys, points = make_sweep(of_one), jr.split(jr.key(0), 1), jnp.asarray(uv)
    general = jax.jit(lambda uv: measure.numerical_rank(jnp.hstack([x * uv[0], x * uv[1]]), 1e-15))
    return {
        "NumPy's SVD of [X*u, X*v]": (numpy_ranks, few),
        "JAX, the same matrix": (
            lambda: [general(pair).block_until_ready() for pair in points[:few]],
            few,
        ),
        "JAX, R diag(sqrt(u^2 + v^2))": (lambda: sweep(keys, points), count),
    }


def main() -> None:
    """Times all sides and prints tables; `--out` also writes them as JSON."""
    args = timing.arguments(__doc__, runs=128, steps=100_001, ranks=348, repeats=5)
    devices.set_up_toys()
    torch.set_num_threads(1)
    per_step, tables = "step_and_run", {}
    sides = diagonal_net_sides(args.steps, args.runs)
    tables["diagonal nets"] = timing.compare(sides, args.repeats, unit=per_step)
    for name in ("1d", "two-layer", "three-layer"):
        print(f"-- {name}")
        sides = fully_connected_sides(name, args.steps, args.runs)
        tables[f"fully connected, {name}"] = timing.compare(sides, args.repeats, unit=per_step)
    print("-- Jacobian ranks")
    tables["Jacobian ranks"] = timing.compare(rank_sides(args.ranks), args.repeats, unit="matrix")
    flags = f"--runs {args.runs} --steps {args.steps} --ranks {args.ranks} --repeats {args.repeats}"
    timing.write(args.out, f"python -m benchmarks.toy {flags}", ("numba", "torch"), tables=tables)


if __name__ == "__main__":
    main()
