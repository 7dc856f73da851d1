"""Alternating timings of the sides of a comparison, and results as JSON with the machine."""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

import jax

Side = TypeVar("Side", bound=Hashable)  # the name of one


def rounds(
    sides: Mapping[Side, Callable], repeats: int, clock: Callable[[], float] = time.perf_counter
) -> dict[Side, list[float]]:
    """Seconds of each side in each round; a first, uncounted round compiles."""
    seconds: dict[Side, list[float]] = {name: [] for name in sides}
    for turn in range(repeats + 1):
        for name, side in sides.items():
            start = clock()
            side()
            if turn:
                seconds[name].append(clock() - start)
    return seconds


def compare(
    counted: Mapping[str, tuple[Callable, int]],
    repeats: int,
    *,
    unit: str,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict]:
    """Microseconds per `unit` of each side (callable, units), and its speed-up over the first.

    `units` is how many a call takes. Medians over rounds, also of speed-ups; prints a table.
    """
    seconds = rounds({name: side for name, (side, _) in counted.items()}, repeats, clock)
    micros = {n: [1e6 * s / counted[n][1] for s in seconds[n]] for n in counted}
    first = next(iter(micros))
    table = {}
    for name, us in micros.items():
        ratios = [base / mine for base, mine in zip(micros[first], us, strict=True)]
        table[name] = {
            f"us_per_{unit}": statistics.median(us),
            "times_faster": statistics.median(ratios),
            "rounds_us": us,
        }
        row = table[name]
        print(
            f"{name:40s} {row[f'us_per_{unit}']:10.3f} us per {unit}  "
            f"{row['times_faster']:9.1f} x “{first}”",
            flush=True,
        )
    return table


def write(path: Path | None, command: str, packages: tuple[str, ...], **results) -> None:
    """JSON of the results, the command, and the machine they were measured on."""
    if path is None:
        return
    entry = {
        "command": command,
        "devices": [str(device) for device in jax.devices()],
        "cpu_count": os.cpu_count(),
        "machine": platform.machine(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "numpy", *packages)},
        **results,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(entry, indent=2) + "\n")


def arguments(doc: str | None, **defaults: int) -> argparse.Namespace:
    """Integer flags by name, and `--out FILE`."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    for name, value in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=value, help=f"default {value}")
    parser.add_argument("--out", type=Path, default=None, help="where to write the JSON")
    return parser.parse_args()
