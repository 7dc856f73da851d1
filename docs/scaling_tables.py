"""Writes the tables of scaling.md from benchmarks/results/scaling*.json, between marks.

python docs/scaling_tables.py
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import scaling
from benchmarks.scaling import MACHINES

HERE = Path(__file__).parent
PAGE = HERE / "scaling.md"
RESULTS = HERE.parent / "benchmarks" / "results"
COUNTED, FOR_TPU, AS_MAPS = (
    json.loads((RESULTS / f"scaling{suffix}.json").read_text())
    for suffix in ("", "_v5e", "_v5e_maps")
)
FOR_H100 = json.loads((RESULTS / "compiled_gpu.json").read_text())
POD = "256 TPU v5e"
PER_DEVICE = 256 // 8  # images of the compiled program
FOR_H100_BATCH, H100_BYTES_PER_S = 256, 3.35e12
SHARE = 0.75  # of the memory of a GPU, which JAX takes by default
MEMORY = (16e9, 80e9)


def sent() -> Iterator[Sequence[str]]:
    """Sizes of the nets, and communication of a step."""
    yield (
        "net",
        "parameters P",
        "norms",
        "channels C",
        "gradients, MB",
        "moments, KB",
        "all-reduces",
        "for v5e",
    )
    for name, net in COUNTED["nets"].items():
        yield (
            f"`{name}`",
            f"{net['parameters']:,}",
            str(net["norms"]),
            f"{net['norm_channels']:,}",
            mega(net["gradient_bytes"]),
            f"{net['norm_bytes'] / 1e3:.1f}",
            *(str(each["nets"][name]["exchanged"]["instructions"]) for each in (COUNTED, FOR_TPU)),
        )


def per_device() -> Iterator[Sequence[str]]:
    """Bytes sent per device and step, by precision and number of devices."""
    yield (
        "net",
        "float32, of 8",
        "float32, of 256",
        "for v5e, of 8",
        "for v5e, of 256",
        "bf16 share",
    )
    for name, net in COUNTED["nets"].items():
        there = FOR_TPU["nets"][name]["exchanged"]
        of = lambda each, n: mega(each[f"bytes_sent_per_device_of_{n}"])
        yield (
            f"`{name}`",
            *(of(net["exchanged"], n) for n in (8, 256)),
            *(of(there, n) for n in (8, 256)),
            f"{100 * there['bytes_by_dtype']['bf16'] / there['bytes']:.1f} %",
        )


def held() -> Iterator[Sequence[str]]:
    """Memory of a device: state, gradients, activations per image, and how many images fit."""
    yield (
        *("net", "state, MB", "gradients, MB", "per image: stored, MB", "per image: v5e, MB"),
        *(f"images in {memory / 1e9:.0f} GB" for memory in MEMORY),
    )
    for name, net in COUNTED["nets"].items():
        stored, compiled = net["kept_bytes_per_image"], compiled_per_image(name)
        fixed = net["state_bytes"] + net["gradient_bytes"] + cifar()
        fits = [
            [(SHARE * memory - fixed) / each for each in (stored, compiled)] for memory in MEMORY
        ]
        yield (
            f"`{name}`",
            mega(net["state_bytes"]),
            mega(net["gradient_bytes"]),
            f"{stored / 1e6:.2f}",
            f"{compiled / 1e6:.2f}",
            *(f"{two_digits(low)} to {two_digits(high)}" for low, high in fits),
        )


def compiled_per_image(name: str) -> float:
    """Bytes of temporaries per image in the program for v5e."""
    return FOR_TPU["nets"][name]["held"]["temporary_bytes"] / PER_DEVICE


def strong() -> Iterator[Sequence[str]]:
    """Milliseconds of a step of 256 images, and efficiency."""
    yield "net", *MACHINES, "1 TPU v5e"
    for name, net in COUNTED["nets"].items():
        alone = [1e3 * work(net, u) / MACHINES[POD].flop_per_s for u in scaling.UTILISATION]
        yield f"`{name}`", *map(parts, net["estimates"].values()), f"{span(sorted(alone))} ms"


def work(net: dict[str, Any], utilisation: float) -> float:
    """Operations of a step with batch 256, divided by the utilisation."""
    return COUNTED["batch_size"] * net["step_flop_per_image"] / utilisation


def parts(estimate: dict[str, Any]) -> str:
    """Computing + gradients + waiting = step, and efficiency."""
    gradients = f"{estimate['gradients_ms'][0]:.2g}"
    step = f"{span(estimate['compute_ms'])} + {gradients} + {span(estimate['waiting_ms'])} ms"
    return f"{step}: {percents(estimate['efficiency'])}"


def roofline() -> Iterator[Sequence[str]]:
    """Kernels and bytes of a compiled training step, and the least time of both on an H100."""
    yield (
        *("net", "kernels", "GB", "least, GB", "temporaries, GB"),
        *("moving, ms", "least moving, ms", "computing, ms"),
    )
    for name in FOR_H100["nets"]:
        if name.endswith("bf16"):
            found, net = FOR_H100["nets"][name], name.split(",")[0]
            sizes = [found[f"{which}bytes_per_step"] for which in ("", "least_")]
            flop = FOR_H100_BATCH * COUNTED["nets"][net]["step_flop_per_image"]
            yield (
                f"`{net}`",
                f"{found['kernels_per_step']:,.0f}",
                *(f"{size / 1e9:.1f}" for size in (*sizes, found["temporary_bytes"])),
                *(f"{1e3 * size / H100_BYTES_PER_S:.1f}" for size in sizes),
                f"{1e3 * flop / MACHINES['8 H100 or H200, NVLink'].flop_per_s:.1f}",
            )


def toys() -> Iterator[Sequence[str]]:
    """Kernels and bytes per step and run of 4,096 runs in one program."""
    yield "program", "kernels per step", "loops that ask the host"
    for name, found in FOR_H100["toys"].items():
        yield name, f"{found['kernels_per_step']:.2f}", str(found["loops_that_ask_the_host"])


def weak() -> Iterator[Sequence[str]]:
    """Efficiency of 256 chips at larger batches."""
    shares = (1, 32, 128)
    yield "net", *(f"batch {256 * each:,} ({each} per chip)" for each in shares)
    for name, net in COUNTED["nets"].items():
        calls = net["exchanged"]["instructions"]
        estimates = [scaling.estimate(net, calls, 256 * each, MACHINES[POD]) for each in shares]
        yield f"`{name}`", *(percents(each["efficiency"]) for each in estimates)


def sets() -> Iterator[Sequence[str]]:
    """Both splits of a data set with labels, on every device."""
    yield "data set", "MB on each device"
    for name, size in COUNTED["data_set_bytes"].items():
        yield ", ".join(f"`{each}`" for each in name.split(", ")), mega(size)


def rows() -> Iterator[Sequence[str]]:
    """Temporaries of the step that gathers from images and from rows of bytes."""
    yield "net", "images [n, 32, 32, 3], MB", "rows [n, 3072], MB", "difference, MB"
    for name, net in AS_MAPS["nets"].items():
        images = net["held"]["temporary_bytes"]
        flat = FOR_TPU["nets"][name]["held"]["temporary_bytes"]
        yield f"`{name}`", mega(images), mega(flat), mega(images - flat)


def compilation() -> Iterator[Sequence[str]]:
    """Seconds on two cores."""
    yield "net", "for 8 CPU devices, s", "for 8 TPU v5e, s"
    for name, net in COUNTED["nets"].items():
        there = FOR_TPU["nets"][name]
        yield f"`{name}`", *(f"{each['held']['compile_s']:.0f}" for each in (net, there))


def cifar() -> int:
    """Bytes of CIFAR-10 on a device."""
    return next(iter(COUNTED["data_set_bytes"].values()))


def mega(size: float) -> str:
    """Bytes in millions."""
    return f"{size / 1e6:,.1f}"


def two_digits(count: float) -> str:
    """A count, rounded down to two digits."""
    unit = 10 ** max(0, len(str(int(count))) - 2)
    return f"{int(count) // unit * unit:,}"


def span(pair: Sequence[float]) -> str:
    """A range, to two digits."""
    return " to ".join(f"{each:.0f}" if each >= 100 else f"{each:.2g}" for each in pair)


def percents(pair: Sequence[float]) -> str:
    """A range of shares."""
    return f"{100 * pair[0]:.2g} to {100 * pair[1]:.2g} %"


TABLES: dict[str, Callable[[], Iterator[Sequence[str]]]] = {
    each.__name__: each
    for each in (sent, per_device, held, strong, roofline, toys, weak, sets, rows, compilation)
}


def table(name: str) -> str:
    """A table in Markdown."""
    head, *body = TABLES[name]()
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(page: str) -> str:
    """The page with every table between marks replaced."""
    mark = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return mark.sub(lambda found: f"{found[1]}{table(found[2])}\n{found[3]}", page)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
