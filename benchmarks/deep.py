"""Image classifiers: a training step, an epoch and an evaluation, ours and PyTorch's, in turn.

    python -m benchmarks.deep --nets resnet18_plain wrn28 densenet100_12 --batch_size 256 \\
        --precision bf16 --out benchmarks/results/deep.json

Both sides: random 32 x 32 images as uint8 on the device, crops and flips, cross-entropy, SGD with
momentum 0.9 and an L2 penalty of 5e-4, a moving average of the weights. Ours is what
`experiments.resnet_cifar` runs. PyTorch's is channels-last, compiled where that works, and under
autocast at bf16. At fp32 both multiply in tf32 where JAX does by default: on recent NVIDIA GPUs.

FLOP/s count convolutions and the last layer by formula (`peaks.step_flop`), alike for both sides;
XLA's own count of the compiled step stands beside it. Drawing the order of examples is part of an
epoch, not of a step. Two idle CPU cores take half a minute for `--nets resnet18_plain --width 8
--batch_size 16 --rounds 1`.
"""

import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

# Both frameworks live in one process: neither may take all of the device's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

from benchmarks import peaks, timing
from experiments import cli
from sgd_sparse_jax import data, measure, models, train
from sgd_sparse_jax._types import Batch, Fetch, TrainState

CLASSES, SHAPE = 10, (32, 32, 3)
STEP_SIZE, MOMENTUM, L2, AVERAGE_DECAY = 0.01, 0.9, 5e-4, 0.999
EVAL_BATCH = 512
TORCH_NETS = ("resnet18_plain", "wrn28", "densenet100_12")
TORCH_MODES = (
    "eager",
    "default",
    "reduce-overhead",
    "max-autotune",
    "max-autotune-no-cudagraphs",
)
LISTS = ("nets", "steps_per_call", "torch_modes")  # flags that take several values
GIB = 2**30


@dataclass(frozen=True)
class Config:
    """Times training steps, epochs and evaluations of image classifiers, ours and PyTorch's."""

    nets: tuple[str, ...] = TORCH_NETS
    """Networks by name; PyTorch's side knows these three."""
    width: int = 0
    """Width in the network's own measure (0: resnet18_plain 64, wrn28 10, densenet100_12 12)."""
    batch_size: int = 256
    """Examples per step, over all devices."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of convolutions; parameters are float32 in both."""
    steps_per_call: tuple[int, ...] = (1, 5, 25)
    """Steps in one compiled call of ours, each tried; on CPUs always 1."""
    torch_modes: tuple[str, ...] = ()
    """PyTorch's: eager, or a mode of torch.compile (none given: eager on CPUs, else default and
    reduce-overhead)."""
    steps: int = 0
    """Steps per round, rounded up to whole calls (0: 10 on CPUs, else 25)."""
    rounds: int = 5
    """How often each side is timed."""
    images: int = 0
    """Training images, an epoch's (0: 20 batches on CPUs, else 50,000)."""
    eval_images: int = 0
    """Images of an evaluation (0: 512 on CPUs, else 10,000)."""
    out: Path | None = None
    """Where to write the JSON; it is written anew after every network."""


class Plan(NamedTuple):
    """A config with everything that depends on the device filled in."""

    config: Config
    dtype: Any
    calls: tuple[int, ...]
    torch_modes: tuple[str, ...]
    no_torch: str  # why PyTorch's side is missing, or ""
    steps: int
    images: data.Images
    test_images: data.Images


class Side(NamedTuple):
    """What is timed: `run()` does `steps` training steps and waits for the last."""

    run: Callable[[], object]
    steps: int
    devices: int
    facts: dict[str, Any]


class Training:
    """Our training of one network, put together as `experiments.resnet_cifar` does."""

    def __init__(self, name: str, plan: Plan):
        batch, width = plan.config.batch_size, plan.config.width or None
        self.plan, self.per_epoch = plan, len(plan.images.labels) // batch
        self.model = models.build(name, classes=CLASSES, width=width, dtype=plan.dtype)
        self.mesh = train.data_mesh()
        tx = optax.chain(optax.add_decayed_weights(L2), optax.sgd(STEP_SIZE, MOMENTUM))
        step = train.make_step(self.model, train.cross_entropy, tx, ema_decay=AVERAGE_DECAY)
        fetch = self.fetch_from(plan.images, augmented=True)
        self.segment = train.make_segment(
            step, fetch, shard=train.split_examples(self.mesh), unroll=1
        )
        self.sampler = train.reshuffled_epochs(len(plan.images.labels), batch)
        x = jnp.zeros((1, *SHAPE), jnp.float32)
        init = partial(train.init_state, model=self.model, tx=tx, x=x, averaged=True)
        self.fresh = jax.jit(init)
        self.state = self.start()

    def start(self) -> TrainState:
        """A fresh state on every device."""
        return train.replicate(self.fresh(jr.key(0)), self.mesh)

    def fetch_from(self, images: data.Images, *, augmented: bool) -> Fetch:
        """Gathers from uint8 images that are on every device; [0, 1] floats come out."""
        placed: Any = (images.images, images.labels)
        pixels, labels = train.replicate(placed, self.mesh)

        def fetch(key, idx):
            x = data.crop_and_flip(key, pixels[idx]) if augmented else pixels[idx]
            return Batch(x.astype(jnp.float32) / 255, labels[idx])

        return fetch


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.main(Config, run, argv)


def run(config: Config) -> dict[str, Any]:
    """Measures every network, prints tables, and writes all of it after each network."""
    validate(config)
    plan = complete(config)
    results: dict[str, Any] = {
        "device_kind": jax.devices()[0].device_kind,
        "precision": config.precision,
        "batch_size": config.batch_size,
        "images": len(plan.images.labels),
        "eval_images": len(plan.test_images.labels),
        "no_torch": plan.no_torch or None,
        "ceilings": measure_ceilings(plan),
        "nets": {},
    }
    packages = ("flax", "optax") if plan.no_torch else ("flax", "optax", "torch")
    for name in config.nets:
        results["nets"][name] = measure_net(name, plan, results["ceilings"])
        show(name, results)
        timing.write(config.out, command(config), packages, **results)
    return results


def validate(config: Config) -> None:
    """Raises ValueError, in the words of the flags, for what can't be run."""
    for field, least in {"batch_size": 1, "rounds": 1, "width": 0, "steps": 0}.items():
        if getattr(config, field) < least:
            raise ValueError(f"--{field} is {getattr(config, field)}; it must be {least} or more.")
    for field, least in {"images": config.batch_size, "eval_images": 1}.items():
        value = getattr(config, field)
        if value and value < least:
            raise ValueError(f"--{field} is {value}; it must be {least} or more (0: a default).")
    if not config.nets or min(config.steps_per_call, default=0) < 1:
        raise ValueError("--nets needs a name, and --steps_per_call numbers of 1 or more.")
    for name in config.nets:
        models.build(name, classes=CLASSES, width=config.width or None)
    if config.batch_size % jax.device_count():
        raise ValueError(
            f"--batch_size is {config.batch_size}, which can't be split over "
            f"{jax.device_count()} devices; choose a multiple of {jax.device_count()}."
        )
    unknown = sorted(set(config.torch_modes) - set(TORCH_MODES))
    if unknown:
        known = ", ".join(TORCH_MODES)
        raise ValueError(f"Unknown --torch_modes {', '.join(unknown)}; known are {known}.")
    if config.torch_modes and (reason := why_no_torch()):
        raise ValueError(f"--torch_modes is given, but {reason}")


def why_no_torch() -> str:
    """Why PyTorch can't be the other side here; "" where it can."""
    if find_spec("torch") is None:
        return "PyTorch is not installed (pip install -e .[bench])."
    import torch

    if jax.default_backend() not in ("cpu", "gpu"):
        return f"PyTorch is not timed on a {jax.default_backend()}."
    if jax.default_backend() == "gpu" and not torch.cuda.is_available():
        return "this PyTorch sees no GPU, and JAX runs on one."
    return ""


def complete(config: Config) -> Plan:
    """Sizes for the device at hand, and images drawn at random."""
    on_cpu = jax.default_backend() == "cpu"
    rng = np.random.default_rng(0)

    def draw(n: int) -> data.Images:
        pixels = rng.integers(0, 256, (n, *SHAPE), dtype=np.uint8)
        labels = rng.integers(0, CLASSES, n).astype(np.int32)
        return data.Images(pixels, labels, tuple(map(str, range(CLASSES))))

    modes = ("eager",) if on_cpu else ("default", "reduce-overhead")
    return Plan(
        config=config,
        dtype=jnp.bfloat16 if config.precision == "bf16" else jnp.float32,
        # Convolutions inside a compiled loop are 16-29 times slower on CPUs (jax issue 12868).
        calls=(1,) if on_cpu else tuple(dict.fromkeys(config.steps_per_call)),
        torch_modes=tuple(dict.fromkeys(config.torch_modes)) or modes,
        no_torch=why_no_torch(),
        steps=config.steps or (10 if on_cpu else 25),
        images=draw(config.images or (20 * config.batch_size if on_cpu else 50_000)),
        test_images=draw(config.eval_images or (512 if on_cpu else 10_000)),
    )


def command(config: Config) -> str:
    """The command line that runs `config` again."""
    words = [f"--{name} {value}" for name, value in vars(config).items() if name not in LISTS]
    lists = {name: getattr(config, name) for name in LISTS if getattr(config, name)}
    words += [f"--{name} {' '.join(map(str, values))}" for name, values in lists.items()]
    return f"python -m benchmarks.deep {' '.join(words)}"


def measure_ceilings(plan: Plan) -> dict[str, float | int]:
    """The rates of one device; of matrix products, the better of both frameworks'."""
    rates = {"jax_matmul_flop_per_s": peaks.matmul_rate(plan.dtype)}
    if not plan.no_torch:
        from benchmarks import torch_nets

        torch_nets.multiply_as_jax_does()
        bf16 = plan.config.precision == "bf16"
        rates["torch_matmul_flop_per_s"] = peaks.torch_matmul_rate(bf16, torch_device())
    rows, array_bytes = peaks.sizes()
    return rates | {
        "matmul_flop_per_s": max(rates.values()),
        "memory_bytes_per_s": peaks.memory_rate(),
        "matmul_rows": rows,
        "memory_array_bytes": array_bytes,
    }


def torch_device() -> str:
    """PyTorch's name for where JAX runs."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def measure_net(name: str, plan: Plan, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """One network: steps of all sides in turn, then our epoch and our evaluation."""
    before = memory_peak()
    ours = Training(name, plan)
    print(f"-- {name}", flush=True)
    sides = {f"ours, {k} per call": our_side(ours, k) for k in plan.calls}
    peak = memory_peak()
    theirs, failed = torch_sides(name, plan)
    flop = peaks.step_flop(ours.model, (plan.config.batch_size, *SHAPE))
    rows = timed(sides | theirs, flop, plan, ceilings)
    best = min(plan.calls, key=lambda k: rows[f"ours, {k} per call"]["ms_per_step"])
    chosen = rows[f"ours, {best} per call"]
    return {
        "width": plan.config.width or "default",
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(ours.state.params)),
        "step_flop": flop,
        "sides": rows,
        "torch_failed": failed,
        # Known where this network raised it: a process has one high-water mark.
        "our_peak_bytes": peak if peak > before else None,
        "floors": floors(flop, rows, ceilings),
        "evaluation": evaluation(ours),
        "epoch": epoch(ours, best, chosen["ms_per_step"]),
    }


def memory_peak() -> int:
    """Most bytes this process has had on a device so far, autotuning included; 0 if not known."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def our_side(ours: Training, per_call: int) -> Side:
    """Calls of `per_call` steps, compiled here; the order of examples is drawn beforehand."""
    plan, key = ours.plan, jr.key(1)
    count = math.ceil(plan.steps / per_call)
    draw = jax.jit(ours.sampler, static_argnums=2)
    calls = np.asarray(draw(key, 0, count * per_call)).reshape(count, per_call, -1)
    advance = jax.jit(ours.segment, donate_argnums=1)

    def some(indices: np.ndarray) -> None:
        for rows in indices:
            ours.state, _ = advance(key, ours.state, rows)
        jax.block_until_ready(ours.state)

    begin = time.perf_counter()
    compiled = advance.lower(key, ours.state, calls[0]).compile()  # jit finds it again
    facts = {"compile_s": time.perf_counter() - begin}
    some(calls[:1])
    facts |= {"first_call_s": time.perf_counter() - begin}
    facts |= counted_by_xla(compiled, per_call)
    print(
        f"ours, {per_call} per call: first call done after {facts['first_call_s']:.1f} s",
        flush=True,
    )
    return Side(lambda: some(calls), count * per_call, jax.device_count(), facts)


def counted_by_xla(compiled: Any, per_call: int) -> dict[str, Any]:
    """Memory of a program of one device; operations and bytes where it is one step without a loop.

    Of a loop XLA counts the body once, or as often as it has unrolled it.
    """
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    facts: dict[str, Any] = {}
    if per_call == 1:
        facts["xla_flop"], facts["xla_bytes"] = cost.get("flops"), cost.get("bytes accessed")
    if memory is not None:
        held = memory.argument_size_in_bytes + memory.output_size_in_bytes
        shared = memory.alias_size_in_bytes
        facts["memory_bytes"] = held - shared + memory.temp_size_in_bytes
    return facts


def torch_sides(name: str, plan: Plan) -> tuple[dict[str, Side], dict[str, str]]:
    """PyTorch in every mode that works, else as it is; and why the others don't."""
    sides: dict[str, Side] = {}
    failed: dict[str, str] = {}
    if plan.no_torch or name not in TORCH_NETS:
        return sides, failed
    for mode in dict.fromkeys((*plan.torch_modes, "eager")):
        if sides and mode not in plan.torch_modes:
            continue  # eager is the last resort
        try:
            sides[f"torch, {mode}"] = torch_side(name, mode, plan)
        except Exception as error:  # whatever a compiler may raise
            failed[mode] = f"{type(error).__name__}: {error}".splitlines()[0]
    return sides, failed


def torch_side(name: str, mode: str, plan: Plan) -> Side:
    """PyTorch's steps, on one device; three are done here, which compile."""
    import torch

    from benchmarks import torch_nets

    device, config = torch_device(), plan.config
    images = torch.from_numpy(plan.images.images).to(device)
    labels = torch.from_numpy(plan.images.labels).long().to(device)
    chosen = {"width": config.width} if config.width else {}
    before = torch_nets.start_counting_memory(device)
    begin = time.perf_counter()
    steps = torch_nets.trainer(
        torch_nets.NETWORKS[name](CLASSES, **chosen),
        images,
        labels,
        batch=config.batch_size,
        bf16=config.precision == "bf16",
        mode=mode,
        lr=STEP_SIZE,
        momentum=MOMENTUM,
        l2=L2,
        average_decay=AVERAGE_DECAY,
    )
    steps(1)
    facts: dict[str, Any] = {"first_call_s": time.perf_counter() - begin}
    print(f"torch, {mode}: first step done after {facts['first_call_s']:.1f} s", flush=True)
    steps(2)  # momentum is there, and CUDA graphs are recorded, only now
    if device == "cuda":
        facts["memory_bytes"] = torch.cuda.max_memory_allocated() - before
    return Side(lambda: steps(plan.steps), plan.steps, 1, facts)


def timed(
    sides: Mapping[str, Side], flop: int, plan: Plan, ceilings: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """All sides in turn, one row each: medians over rounds, rates, and shares of the ceiling."""
    seconds = timing.rounds({name: side.run for name, side in sides.items()}, plan.config.rounds)
    rows = {}
    for name, side in sides.items():
        each = [s / side.steps for s in seconds[name]]
        step = statistics.median(each)
        peak = ceilings["matmul_flop_per_s"] * side.devices
        rows[name] = {
            "ms_per_step": 1e3 * step,
            "images_per_s": plan.config.batch_size / step,
            "flop_per_s": flop / step,
            "share_of_matmul_peak": flop / step / peak,
            "devices": side.devices,
            **side.facts,
            "rounds_ms_per_step": [1e3 * s for s in each],
        }
    return rows


def floors(
    flop: int, sides: Mapping[str, Mapping[str, Any]], ceilings: Mapping[str, float]
) -> dict[str, float | None]:
    """What a step of ours can't be faster than: its operations, and the bytes XLA says it moves."""
    row = sides.get("ours, 1 per call", {})
    moved, counted = row.get("xla_bytes"), row.get("xla_flop")
    devices = jax.device_count()  # XLA counts what one of them does
    return {
        "operations_ms": 1e3 * flop / ceilings["matmul_flop_per_s"] / devices,
        "memory_ms": moved and 1e3 * moved / ceilings["memory_bytes_per_s"],
        "xla_step_gflop": counted and counted * devices / 1e9,
    }


def epoch(ours: Training, per_call: int, ms_per_step: float) -> dict[str, Any]:
    """The second of two epochs through `train.fit`: order, losses fetched, finiteness checked."""
    stamps = []
    train.fit(
        jr.key(2),
        ours.start(),
        ours.sampler,
        ours.segment,
        num_steps=2 * ours.per_epoch,
        eval_every=ours.per_epoch,
        evaluate=lambda state: stamps.append(time.perf_counter()) or {},
        on_row=lambda row: None,
        steps_per_call=per_call,
    )
    seconds = stamps[2] - stamps[1]
    return {
        "seconds": seconds,
        "steps": ours.per_epoch,
        "steps_per_call": per_call,
        "over_steps": seconds / (1e-3 * ms_per_step * ours.per_epoch),
    }


def evaluation(ours: Training) -> dict[str, Any]:
    """One evaluation, without and with sparsity, beside its bare forward passes."""
    key, n = jr.key(3), len(ours.plan.test_images.labels)
    devices, shard = jax.device_count(), train.split_examples(ours.mesh)
    batch = math.ceil(min(EVAL_BATCH, n) / devices) * devices
    fetch = ours.fetch_from(ours.plan.test_images, augmented=False)
    make = partial(
        measure.make_evaluation, ours.model, train.cross_entropy, fetch, batch=batch, shard=shard
    )
    sparsity = make(
        sample=lambda block, phi: measure.sample_units(key, phi),
        distinct=lambda units: measure.feature_sparsity(units)[1],
    )

    @jax.jit
    def forward(params, stats, idx):
        logits, _ = ours.model.apply({"params": params, **stats}, fetch(key, shard(idx)).x)
        return logits

    state, rows = ours.state, [np.arange(k, k + batch) % n for k in range(0, n, batch)]
    passes = lambda: [forward(state.params, state.stats, idx.astype(np.int32)) for idx in rows]
    gauges = {"evaluation": make(), "with_sparsity": sparsity}
    sides = {"forward": lambda: jax.block_until_ready(passes())} | {
        name: partial(gauge, key, state.params, state.stats, n) for name, gauge in gauges.items()
    }
    seconds = timing.rounds(sides, ours.plan.config.rounds)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    over = {f"{name}_over_forward": middle[name] / middle["forward"] for name in gauges}
    return {"images": n} | {f"{name}_s": value for name, value in middle.items()} | over


def show(name: str, results: Mapping[str, Any]) -> None:
    """A network's sides as a table, and what else was measured below it."""
    from rich.console import Console
    from rich.table import Table

    net, console = results["nets"][name], Console()
    words = (name, f"{net['parameters']:,} parameters", f"batch {results['batch_size']}")
    table = Table(title=", ".join((*words, results["precision"], results["device_kind"])))
    table.caption = (
        "peak: of matrix products; start: until the first call is done; GiB: ours as the compiler "
        f"plans it, PyTorch's as allocated. Devices: {jax.device_count()} of ours, 1 of PyTorch's."
    )
    table.add_column("side", no_wrap=True)
    headings = ("ms/step", "images/s", "TFLOP/s", "of peak", "start (s)", "GiB")
    for heading in headings:
        table.add_column(heading, justify="right")
    for side, row in net["sides"].items():
        memory = row.get("memory_bytes")
        table.add_row(
            side,
            f"{row['ms_per_step']:.2f}",
            f"{row['images_per_s']:,.0f}",
            f"{row['flop_per_s'] / 1e12:.3g}",
            f"{row['share_of_matmul_peak']:.1%}",
            f"{row['first_call_s']:.1f}",
            "–" if memory is None else f"{memory / GIB:.2f}",
        )
    console.print(table)
    for line in remarks(net, results):
        console.print(line, highlight=False, soft_wrap=True)


def remarks(net: Mapping[str, Any], results: Mapping[str, Any]) -> list[str]:
    """Ceilings, floors, epoch, evaluation, and what is missing, in a line each."""
    top, floor = results["ceilings"], net["floors"]
    whole, seen = net["epoch"], net["evaluation"]
    known = lambda value, unit: f"{value:.4g} {unit}" if value else f"{unit} not known"
    lines = [
        f"ceilings of one device: {top['matmul_flop_per_s'] / 1e12:.4g} TFLOP/s in matrix "
        f"products, {top['memory_bytes_per_s'] / 1e9:.4g} GB/s read and written",
        f"a step: {net['step_flop'] / 1e9:.5g} GFLOP by formula (used above), "
        f"{known(floor['xla_step_gflop'], 'GFLOP by XLA')}; at least "
        f"{floor['operations_ms']:.4g} ms for its operations and "
        f"{known(floor['memory_ms'], 'ms for the bytes that our program accesses')}",
        f"an epoch of ours: {whole['seconds']:.4g} s for {whole['steps']} steps, "
        f"{whole['steps_per_call']} per call, {whole['over_steps']:.3f} of its steps alone",
        f"an evaluation of ours on {seen['images']:,} images: {seen['evaluation_s']:.4g} s, "
        f"{seen['evaluation_over_forward']:.3f} of its forward passes; with sparsity "
        f"{seen['with_sparsity_s']:.4g} s, {seen['with_sparsity_over_forward']:.3f} of them",
    ]
    if net["our_peak_bytes"]:
        peak = net["our_peak_bytes"] / GIB
        lines.append(f"our allocator's peak: {peak:.2f} GiB, autotuning while compiling included")
    lines += [f"torch, {mode} failed: {why}" for mode, why in net["torch_failed"].items()]
    if results["no_torch"]:
        lines.append(f"ours only: {results['no_torch']}")
    elif not any(side.startswith("torch") for side in net["sides"]):
        lines.append("ours only: PyTorch's side has no network of that name, or none that ran.")
    return lines


if __name__ == "__main__":
    main()
