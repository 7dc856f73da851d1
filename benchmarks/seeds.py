"""Cost of seeds: time per run from 1 to 4,096 seeds, and memory of a large sweep.

    python -m benchmarks.seeds --out benchmarks/results/seeds.json

Diagonal nets of D1's size in float64, which return final parameters. The memory is the peak of the
process, including the compiler.
"""

import resource
import statistics

import jax.numpy as jnp
import numpy as np

from benchmarks import timing, toy as toys
from experiments.figures import plots
from experiments.launch import devices
from experiments.toy import problems


def main() -> None:
    """Measures, prints, and writes JSON and a figure next to it."""
    args = timing.arguments(__doc__, most=4096, steps=2_000, points=8, repeats=3)
    devices.set_up_toys()
    toy = problems.PROBLEMS["diagonal"]()
    counts = [4**k for k in range(12) if 4**k <= args.most]
    seconds = timing.rounds(
        {
            str(count): toys.jax_side(toy, args.steps, count, toys.DIAGONAL_STEP_SIZE)
            for count in counts
        },
        args.repeats,
    )
    curve = {count: statistics.median(seconds[str(count)]) for count in counts}
    for count, value in curve.items():
        each = 1e6 * value / count / args.steps
        print(f"{count:6d} seeds: {value:8.4f} s, {each:8.3f} us per step and run")
    whole = toys.sweep_side(toy, args.steps, args.most, jnp.linspace(0.05, 0.25, args.points))
    runs = whole()["u"].shape[0] * args.points
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{args.most} seeds x {args.points} step sizes: peak memory {peak:.2f} GiB")
    timing.write(
        args.out,
        f"python -m benchmarks.seeds --most {args.most} --steps {args.steps} "
        f"--points {args.points} --repeats {args.repeats}",
        (),
        seconds_by_seeds=curve,
        steps=args.steps,
        runs_of_large_sweep=runs,
        peak_gib_of_large_sweep=peak,
    )
    if args.out:
        x = np.array(counts)
        panel = plots.Panel(
            f"{args.steps:,} steps of D1's diagonal nets",
            "seconds",
            {
                "measured": (x, np.array(list(curve.values()))),
                "proportional to seeds": (x, x * curve[counts[-1]] / counts[-1]),
            },
            xlabel="seeds",
            log_x=True,
            log_y=True,
        )
        plots.figure(args.out.with_suffix(""), [panel])


if __name__ == "__main__":
    main()
