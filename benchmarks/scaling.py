"""Communication and memory of a training step on several devices, counted from its program.

    python -m benchmarks.scaling --out benchmarks/results/scaling.json
    python -m benchmarks.scaling --topology v5e:2x4 --out benchmarks/results/scaling_v5e.json

The step is that of `experiments.resnet_cifar` on 32 x 32 images: crops, flips, momentum, an L2
penalty, averaged weights. It is compiled for several devices but not executed: for CPUs, or for the
TPUs of `--topology`, which need not exist (`pip install -e .[tpu]` installs their compiler, whose
warnings about missing TPUs are harmless). Step times are estimates from published peaks and assumed
utilisation, see `estimate`. Two cores take two minutes.
"""

import math
import os
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import deep_plan, peaks, timing
from experiments.launch import cli
from sgd_sparse_jax import data, models, train
from sgd_sparse_jax.types import Batch

NETS = ("resnet18_plain", "resnet34", "wrn28", "vgg16", "densenet100_12")
DATA_SETS = {  # images of both splits, bytes of one
    "cifar10, cifar100": (60_000, 32 * 32 * 3),
    "svhn": (73_257 + 26_032, 32 * 32 * 3),
    "mnist, fashion_mnist": (70_000, 28 * 28),
    "tiny_imagenet": (110_000, 64 * 64 * 3),
}
RESIDENT = DATA_SETS["cifar10, cifar100"][0]
COLLECTIVE = re.compile(
    r"^\s*(?:ROOT )?%?\S+ = (?P<result>.*?) (?P<op>all-reduce|all-gather|reduce-scatter|all-to-all"
    r"|ragged-all-to-all|collective-permute|collective-broadcast|send|recv)(?:-start)?\("
)
ARRAY = re.compile(r"\b([a-z]+\d*[a-z\d]*)\[([\d,]*)\]")


class Machine(NamedTuple):
    """A group of devices: published figures of one, and an assumed latency."""

    devices: int
    flop_per_s: float  # published: dense, bf16
    bytes_per_s: float  # published: what a device can send, in one direction
    latency_s: tuple[float, float]  # assumed: of one small all-reduce


MACHINES = {
    "8 H100 or H200, NVLink": Machine(8, 989e12, 450e9, (10e-6, 20e-6)),
    "8 TPU v5e": Machine(8, 197e12, 200e9, (10e-6, 20e-6)),
    # Four times 15 hops around a torus of 16 x 16, of less than a microsecond each.
    "256 TPU v5e": Machine(256, 197e12, 200e9, (20e-6, 60e-6)),
}
UTILISATION = (0.2, 0.4)  # assumed: share of the published operations per second


@dataclass(frozen=True)
class Config:
    """Counts communication and memory of a data-parallel training step for each network."""

    nets: tuple[str, ...] = NETS
    """Networks by name."""
    width: int = 0
    """Width of the networks (0: their defaults)."""
    batch_size: int = 256
    """Examples per step, over all devices."""
    devices: int = 8
    """CPU devices to compile for."""
    topology: str = ""
    """TPUs to compile for instead of CPUs, such as v5e:2x4 (needs the extra `tpu`, but no TPU)."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of convolutions; parameters are float32 in both."""
    images_as_maps: bool = False
    """Store images on the devices as maps, not as rows of bytes, to count the cost."""
    out: Path | None = None
    """Where to write the JSON, after every network."""


class Collective(NamedTuple):
    """An instruction by which devices exchange arrays, and its results."""

    op: str
    arrays: tuple[tuple[str, tuple[int, ...]], ...]  # dtype and shape of each

    @property
    def elements(self) -> int:
        """Numbers in all arrays."""
        return sum(math.prod(shape) for _, shape in self.arrays)

    @property
    def bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(math.prod(shape) * itemsize(dtype) for dtype, shape in self.arrays)


def itemsize(dtype: str) -> int:
    """Bytes of one number, by XLA's name: bf16, f32, s32, pred, f8e4m3fn."""
    bits = re.search(r"\d+", dtype)
    return max(1, int(bits[0]) // 8) if bits else 1


def collectives(hlo_text: str) -> list[Collective]:
    """Collectives of a compiled program (`lower(...).compile().as_text()`), in order.

    An instruction inside a loop counts once; so does an asynchronous one, by its start.
    """
    found = []
    for line in hlo_text.splitlines():
        if match := COLLECTIVE.match(line):
            arrays = ARRAY.findall(match["result"])
            shapes = [tuple(int(n) for n in dims.split(",") if n) for _, dims in arrays]
            dtypes = [dtype for dtype, _ in arrays]
            found.append(Collective(match["op"], tuple(zip(dtypes, shapes, strict=True))))
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.main(Config, run, argv)


def run(config: Config) -> dict[str, Any]:
    """Counts every network, writes all results after each, and prints tables."""
    mesh = train.data_mesh(devices_of(config))
    if config.batch_size % mesh.size:
        raise ValueError(
            f"--batch_size is {config.batch_size}, which can't be split over {mesh.size} devices; "
            f"choose a multiple of {mesh.size}."
        )
    results: dict[str, Any] = {
        "compiled_for": f"{mesh.size} x {mesh.devices.flat[0].device_kind}",
        "batch_size": config.batch_size,
        "precision": config.precision,
        "utilisation": UTILISATION,
        "machines": {name: machine._asdict() for name, machine in MACHINES.items()},
        # A label takes 4 bytes.
        "data_set_bytes": {name: n * (size + 4) for name, (n, size) in DATA_SETS.items()},
        "nets": {},
    }
    packages = ("flax", "optax", *(("libtpu",) if config.topology else ()))
    for name in config.nets:
        results["nets"][name] = count(name, config, mesh)
        timing.write(config.out, command(config), packages, **results)
    show(results)
    return results


def devices_of(config: Config) -> Sequence[Any]:
    """CPUs of this machine, `--devices` of them, or descriptions of TPUs."""
    jax.config.update("jax_platforms", "cpu")  # nothing runs: does not occupy an accelerator
    if not config.topology:
        jax.config.update("jax_num_cpu_devices", config.devices)
        return jax.devices()
    from jax.experimental import topologies

    os.environ.setdefault(
        "TPU_SKIP_MDS_QUERY", "1"
    )  # else it queries Google's cloud for its location
    try:
        return topologies.get_topology_desc(config.topology, platform="tpu").devices
    except Exception as error:
        raise ValueError(
            f"--topology {config.topology} can't be compiled for ({error}); it needs the compiler "
            "of pip install -e .[tpu], and a name such as v5e:2x4 or v5e:16x16."
        ) from error


def command(config: Config) -> str:
    """The command line that runs `config` again."""
    flags = vars(config) | {"nets": " ".join(config.nets)}
    words = [f"--{name} {value}" for name, value in flags.items() if value not in ("", None, False)]
    words = [word.removesuffix(" True") for word in words]
    return f"python -m benchmarks.scaling {' '.join(words)}"


def count(name: str, config: Config, mesh: Mesh) -> dict[str, Any]:
    """One network: sizes, communication and memory of its compiled step, and step times."""
    dtype = jnp.bfloat16 if config.precision == "bf16" else jnp.float32
    model = models.build(name, classes=deep_plan.CLASSES, width=config.width or None, dtype=dtype)
    flop = peaks.step_flop(model, (1, *deep_plan.SHAPE))
    begin = time.perf_counter()
    state, program = step_of(model, config, mesh)
    compiled = program.compile()
    seconds = time.perf_counter() - begin
    sent, memory = collectives(compiled.as_text()), compiled.memory_analysis()
    parameters, channels = size(state.params), size(state.stats) // 2
    sizes = {
        "parameters": parameters,
        "norm_channels": channels,
        "norms": len(jax.tree.leaves(state.stats)) // 2,
        "step_flop_per_image": flop,
        "state_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state)),
        "gradient_bytes": 4 * parameters,
        "norm_bytes": 4 * 2 * channels,
        "kept_bytes_per_image": kept_bytes_per_image(model),
    }
    exchanged = {
        "ops": sorted({each.op for each in sent}),
        "instructions": len(sent),
        "elements": sum(each.elements for each in sent),
        "elements_by_law": parameters + 2 * channels + 1,
        "bytes": sum(each.bytes for each in sent),
        "bytes_by_dtype": bytes_by_dtype(sent),
    }
    for n in sorted({machine.devices for machine in MACHINES.values()}):
        exchanged[f"bytes_sent_per_device_of_{n}"] = round(ring(n) * exchanged["bytes"])
    held = {
        "resident_bytes": memory.argument_size_in_bytes,  # state and data set
        "temporary_bytes": memory.temp_size_in_bytes,
        "compile_s": seconds,
    }
    print(f"{name}: compiled in {seconds:.0f} s", flush=True)
    guesses = {
        machine: estimate(sizes, exchanged["instructions"], config.batch_size, figures)
        for machine, figures in MACHINES.items()
    }
    return sizes | {"exchanged": exchanged, "held": held, "estimates": guesses}


def bytes_by_dtype(sent: Sequence[Collective]) -> dict[str, int]:
    """Bytes of all arrays of each dtype."""
    arrays = [array for each in sent for array in each.arrays]
    dtypes = sorted({dtype for dtype, _ in arrays})
    return {d: Collective("", tuple(a for a in arrays if a[0] == d)).bytes for d in dtypes}


def size(tree: Any) -> int:
    """Numbers in all leaves."""
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def ring(devices: int) -> float:
    """Bytes that each device of a ring sends to all-reduce one byte."""
    return 2 * (devices - 1) / devices


def step_of(model: nn.Module, config: Config, mesh: Mesh) -> tuple[Any, Any]:
    """Shapes of the training state, and the lowered program of one step on CIFAR-10's images."""
    tx = optax.chain(
        optax.add_decayed_weights(deep_plan.L2), optax.sgd(deep_plan.STEP_SIZE, deep_plan.MOMENTUM)
    )
    network = models.from_linen(model)
    objective = train.make_objective(network, train.cross_entropy)
    step = train.make_step(objective, tx, ema_decay=deep_plan.AVERAGE_DECAY)

    def program(pixels, key, state, indices):
        def fetch(key, idx):
            x = data.crop_and_flip(key, pixels.x[idx].reshape(-1, *deep_plan.SHAPE))
            return Batch(x.astype(jnp.float32) / 255, pixels.y[idx])

        segment = train.make_segment(step, fetch, shard=train.split_examples(mesh), unroll=1)
        return segment(key, state, indices)

    everywhere = NamedSharding(mesh, PartitionSpec())
    on_all = partial(
        jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
    )
    x = jnp.zeros((1, *deep_plan.SHAPE), jnp.float32)
    init = partial(train.init_state, network=network, tx=tx, x=x, averaged=True)
    key = jax.eval_shape(lambda: jr.key(0))
    state = jax.eval_shape(init, key)
    one = deep_plan.SHAPE if config.images_as_maps else (math.prod(deep_plan.SHAPE),)
    described: Any = jax.ShapeDtypeStruct
    pixels = Batch(described((RESIDENT, *one), jnp.uint8), described((RESIDENT,), jnp.int32))
    indices = described((1, config.batch_size), jnp.int32)
    lowered = jax.jit(program, donate_argnums=2).lower(*map(on_all, (pixels, key, state, indices)))
    return state, lowered


def kept_bytes_per_image(model: nn.Module) -> int:
    """Bytes that reverse mode stores per image of a batch, if the compiler recomputes nothing."""

    def of_batch(b: int) -> int:
        x = jax.ShapeDtypeStruct((b, *deep_plan.SHAPE), jnp.float32)
        variables = dict(jax.eval_shape(model.init, jr.key(0), x))
        params = variables.pop("params")

        def pullback(params, stats, x):
            logits = lambda p: model.apply(
                {"params": p, **stats}, x, train=True, mutable=list(stats)
            )[0][0]
            return jax.vjp(logits, params)[1]

        residuals = jax.tree.leaves(jax.eval_shape(pullback, params, variables, x))
        return sum(leaf.size * leaf.dtype.itemsize for leaf in residuals)

    return of_batch(2) - of_batch(1)


def estimate(
    sizes: Mapping[str, Any], all_reduces: int, batch: int, machine: Machine
) -> dict[str, tuple[float, float]]:
    """Milliseconds of a step's parts, and efficiency = time on one device / (n time on n).

    Each a range over the assumed utilisation u and latency l, with nothing overlapped: compute
    F B / (n u peak), gradients 2 (n - 1) / n bytes / link, waiting l for each all-reduce.
    """
    n, work = machine.devices, sizes["step_flop_per_image"] * batch / machine.flop_per_s
    gradients = ring(n) * sizes["gradient_bytes"] / machine.bytes_per_s
    compute = [work / n / u for u in reversed(UTILISATION)]
    waits = [all_reduces * latency for latency in machine.latency_s]
    step = [c + gradients + w for c, w in zip(compute, waits, strict=True)]
    # The faster a device computes, the more of a step is waiting.
    corners = ((compute[0], waits[1]), (compute[1], waits[0]))
    efficiency = [c / (c + gradients + w) for c, w in corners]
    ms = lambda pair: (1e3 * pair[0], 1e3 * pair[1])
    return {
        "compute_ms": ms(compute),
        "gradients_ms": ms((gradients, gradients)),
        "waiting_ms": ms(waits),
        "step_ms": ms(step),
        "efficiency": (efficiency[0], efficiency[1]),
    }


def show(results: Mapping[str, Any]) -> None:
    """Prints a table of counts of all networks, and one of estimates."""
    from rich.console import Console
    from rich.table import Table

    console, mega = Console(), 1e6
    counts = Table(title=f"one step of {results['batch_size']}, {results['compiled_for']}")
    headings = ("net", "parameters", "norm channels", "GFLOP/image", "state MB", "gradients MB")
    headings += ("norms KB", "all-reduces", "sent MB", "temporary MB", "saved MB/image")
    for heading in headings:
        counts.add_column(heading, justify="left" if heading == "net" else "right")
    guesses = Table(title="estimates: ms computing + gradients + waiting, and efficiency")
    for heading in ("net", *results["machines"]):
        guesses.add_column(heading)
    span = lambda pair: f"{pair[0]:.2g}-{pair[1]:.2g}"
    for name, net in results["nets"].items():
        counts.add_row(
            name,
            f"{net['parameters']:,}",
            f"{net['norm_channels']:,}",
            f"{net['step_flop_per_image'] / 1e9:.2f}",
            f"{net['state_bytes'] / mega:.1f}",
            f"{net['gradient_bytes'] / mega:.1f}",
            f"{net['norm_bytes'] / 1e3:.1f}",
            f"{net['exchanged']['instructions']}",
            f"{net['exchanged']['bytes'] / mega:.1f}",
            f"{net['held']['temporary_bytes'] / mega:.0f}",
            f"{net['kept_bytes_per_image'] / mega:.1f}",
        )
        cells = [
            f"{span(each['compute_ms'])} + {each['gradients_ms'][0]:.2g} + "
            f"{span(each['waiting_ms'])}; {each['efficiency'][0]:.0%}-{each['efficiency'][1]:.0%}"
            for each in net["estimates"].values()
        ]
        guesses.add_row(name, *cells)
    console.print(counts)
    console.print(guesses)


if __name__ == "__main__":
    main()
