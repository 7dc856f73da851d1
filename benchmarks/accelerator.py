"""All measurements on an accelerator in one call: deep steps and toy sweeps.

    python -m benchmarks.accelerator --out benchmarks/results/h100.json

Deep networks: `benchmarks.deep` in bf16 and fp32, alternating with PyTorch if installed: step,
epoch, evaluation, memory, and the share of the rate of matrix products. Toys: SGD steps per second
of diagonal nets (D1, float64), from 1 to --most_runs runs in one program. Writes one JSON and, next
to it, one figure. Also runs on a CPU, at small sizes.
"""

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.random as jr
import numpy as np

from benchmarks import deep, deep_plan, timing
from benchmarks.toy_runs import make_run
from experiments.figures import plots
from experiments.launch import cli
from experiments.toy import problems

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


def toys(config: Config) -> dict[int, float]:
    """Number of runs -> median seconds of a call, which leaves final parameters on the device."""
    counts = [4**k for k in range(32) if 4**k <= config.most_runs]
    sides = {str(count): toy_side(count, config.toy_steps) for count in counts}
    seconds = timing.rounds(sides, config.rounds)
    return {count: statistics.median(seconds[str(count)]) for count in counts}


def toy_side(runs: int, steps: int):
    """`runs` diagonal nets in one program, which also draws the order of examples."""
    toy = problems.PROBLEMS["diagonal"]()
    run, keys = make_run(toy, steps), jr.split(jr.key(0), runs)
    program = jax.jit(jax.vmap(lambda key: run(key, STEP_SIZE)[0].params))
    return lambda: jax.block_until_ready(program(keys))


def draw(config: Config, results: dict[str, Any]) -> None:
    """Draws images per second of every side of every net, and toy steps per second over runs."""
    seconds = results["toy_seconds_by_runs"]
    counts = np.array(list(seconds))
    rate = counts * config.toy_steps / np.array(list(seconds.values()))
    toy = plots.Panel(
        "Diagonal nets, float64", "SGD steps per second", {"all runs": (counts, rate)}
    )
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
