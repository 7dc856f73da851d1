"""All measurements on an accelerator in one call: deep steps and toy sweeps.

    python -m benchmarks.accelerator --out benchmarks/results/h100.json

Deep networks: `benchmarks.deep` in bf16 and fp32, alternating with PyTorch if installed: step,
epoch, evaluation, memory, and the share of the rate of matrix products. Toys: SGD steps per second
of diagonal nets (D1, float64), from 1 to --most_runs runs in one program, on GPUs also with the
Pallas kernel of `pallas_diagonal`. Writes one JSON and, next to it, one figure. Also runs on a CPU,
at small sizes.
"""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np

from benchmarks import deep, deep_plan, pallas_diagonal, timing
from benchmarks.toy_runs import make_run
from experiments.figures import plots
from experiments.launch import cli
from experiments.toy import problems
from sgd_sparse_jax import train

STEP_SIZE = 0.25  # D1's, which is stable


@dataclass(frozen=True)
class Config:
    """Measures deep steps, epochs and evaluations, and toy sweeps, on the available devices."""

    nets: tuple[str, ...] = deep_plan.TORCH_NETS
    """Networks by name."""
    precisions: tuple[str, ...] = ("bf16", "fp32")
    """Precisions of convolutions."""
    width: int = 0
    """Width of the networks (0: their defaults)."""
    batch_size: int = 256
    """Examples per step."""
    images: int = 0
    """Training images (0: 20 batches on CPUs, else 50,000)."""
    eval_images: int = 0
    """Images of an evaluation (0: 512 on CPUs, else 10,000)."""
    most_runs: int = 65_536
    """Largest number of toy runs in one program; all numbers are powers of 4."""
    toy_steps: int = 1_000
    """SGD steps of each toy run."""
    rounds: int = 5
    """Number of timings of everything."""
    out: Path = Path("accelerator.json")
    """Where to write the JSON; the figure has the same name."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.main(Config, run, argv)


def run(config: Config) -> dict[str, Any]:
    """Measures everything, then draws the figure."""
    results: dict[str, Any] = {"device_kind": jax.devices()[0].device_kind, "deep": {}}
    write = lambda: timing.write(config.out, command(config), ("flax", "optax"), **results)
    for precision in config.precisions:
        chosen: Any = {"precision": precision, "nets": config.nets, "rounds": config.rounds}
        sizes = {n: getattr(config, n) for n in ("width", "batch_size", "images", "eval_images")}
        results["deep"][precision] = deep.run(deep_plan.Config(**chosen, **sizes))
        write()
    with jax.enable_x64(True):
        results["toy_seconds_by_runs"] = toys(config)
    results["toy_steps"] = config.toy_steps
    write()
    draw(config, results)
    return results


def toys(config: Config) -> dict[str, dict[int, float]]:
    """Number of runs -> median seconds of a call, which leaves final parameters on the device."""
    counts = [4**k for k in range(32) if 4**k <= config.most_runs]
    programs = {"XLA": toy_program}
    if jax.default_backend() == "gpu":
        programs["Pallas"] = pallas_program
    sides = {
        (name, count): toy_side(program, count, config.toy_steps)
        for name, program in programs.items()
        for count in counts
    }
    seconds = timing.rounds(sides, config.rounds)
    medians = {key: statistics.median(values) for key, values in seconds.items()}
    return {name: {count: medians[name, count] for count in counts} for name in programs}


def toy_side(program: Callable, runs: int, steps: int) -> Callable:
    """`program` as a callable that waits for its results; compiled at the first call."""
    compiled, keys = jax.jit(partial(program, steps)), jr.split(jr.key(0), runs)
    return lambda: jax.block_until_ready(compiled(keys))


def toy_program(steps: int, keys: jax.Array) -> Any:
    """Final parameters of one diagonal net per key, as a user would write it."""
    run = make_run(problems.PROBLEMS["diagonal"](), steps)
    return jax.vmap(lambda key: run(key, STEP_SIZE)[0].params)(keys)


def pallas_program(steps: int, keys: jax.Array, *, interpret: bool = False) -> Any:
    """The same runs, with all steps in one kernel."""
    toy = problems.PROBLEMS["diagonal"]()
    x, y = toy.train
    sampler = train.with_replacement(len(y), 1)
    initial = jax.vmap(lambda key: toy.network(1.0).init(key, x)[0])(keys)
    order = jax.vmap(lambda key: sampler(jr.split(key)[0], 0, steps)[:, 0])(keys)
    sizes = jnp.full(len(keys), STEP_SIZE)
    u, v = pallas_diagonal.segment(
        x, y, initial["u"], initial["v"], order, sizes, interpret=interpret
    )
    return {"u": u, "v": v}


def draw(config: Config, results: dict[str, Any]) -> None:
    """Draws images per second of every side of every net, and toy steps per second over runs."""
    rates = {}
    for name, seconds in results["toy_seconds_by_runs"].items():
        counts = np.array(list(seconds))
        rates[name] = (counts, counts * config.toy_steps / np.array(list(seconds.values())))
    toy = plots.Panel("Diagonal nets, float64", "SGD steps per second", rates)
    panels = [toy._replace(xlabel="runs in one program", log_x=True, log_y=True)]
    for precision, found in results["deep"].items():
        lines: dict[str, Any] = {}
        for place, net in enumerate(found["nets"].values()):
            for side, row in net["sides"].items():
                x, y = lines.setdefault(side, ([], []))
                x.append(place)
                y.append(row["images_per_s"])
        arrays = {side: (np.array(x), np.array(y)) for side, (x, y) in lines.items()}
        names = ", ".join(f"{i}: {name}" for i, name in enumerate(found["nets"]))
        panel = plots.Panel(f"Training, {precision}", "images per second", arrays, xlabel=names)
        panels.append(panel._replace(log_y=True))
    plots.figure(config.out.with_suffix(""), panels, title=results["device_kind"])


def command(config: Config) -> str:
    """The command line that runs `config` again."""
    text = lambda value: " ".join(value) if isinstance(value, tuple) else value
    flags = [f"--{name} {text(value)}" for name, value in dataclasses.asdict(config).items()]
    return " ".join(["python -m benchmarks.accelerator", *flags])


if __name__ == "__main__":
    main()
