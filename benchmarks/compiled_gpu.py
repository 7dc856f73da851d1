"""Programs for an H100, compiled without a GPU: kernels, bytes and memory per step.

    python -m venv gpu && gpu/bin/pip install -e ".[cuda12]"     # 5.6 GB
    gpu/bin/python -m benchmarks.compiled_gpu --out benchmarks/results/compiled_gpu.json

XLA's CUDA plugin compiles ahead of time for a described device. Nothing is executed, and cuDNN's
algorithms are not selected: the numbers are counts of kernels and bytes, not speeds. The bytes of a
kernel are the sizes of the arrays it reads and writes; of an array it gathers from, only the rows;
of an array it updates in place, only the update.

`least_bytes` is a lower bound for a training step: each of three passes of a convolution reads its
inputs and writes its outputs once; a norm reads its map for the moments, reads and writes it to
normalize, reads map and gradient for two sums, and reads both and writes one; parameters, momentum
and their average (float32) are read and written.
"""

import collections
import math
import os
import re
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"  # does not use a GPU

import jax
import jax.numpy as jnp
import jax.random as jr
import optax
from jax.experimental import topologies
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from benchmarks import pallas_diagonal, timing
from benchmarks.toy_runs import make_run
from experiments.toy import problems
from sgd_sparse_jax import Batch, data, models, train

UNROLL = 4  # steps per iteration, the default of `train.record_run`

# NVIDIA H100 80GB HBM3, as XLA describes it.
H100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: 233472 threads_per_core_limit: 2048 core_count: 132 fpus_per_core: 128
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 clock_rate_ghz: 1.98
  device_memory_size: 84978434048 shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
BYTES = {"bf16": 2, "f16": 2, "pred": 1} | {f"{k}{8 * b}": b for k in "fsu" for b in (1, 2, 4, 8)}
NO_KERNEL = ("parameter", "tuple", "get-tuple-element", "bitcast", "constant", "while", "call")
SLICES = ("gather", "dynamic-slice", "slice")
LARGE = 2**20  # bytes from which copies are counted
NETS = {"resnet18_plain": 64, "wrn28": 10, "densenet100_12": 12}
STEPS = 25  # of one compiled call
PALLAS_STEPS = 1024  # of one kernel


class Instruction(NamedTuple):
    """A line of a compiled program."""

    name: str
    shape: str
    operation: str
    operands: list[str]
    attributes: str

    @property
    def bytes(self) -> int:
        """Bytes of its result."""
        return size(self.shape)

    def refers_to(self, attribute: str) -> str:
        """The computation that an attribute names, such as a fusion's `calls`."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""


def size(shape: str) -> int:
    """Bytes of all arrays in the text of a shape.

    Example:
        >>> size("(bf16[2,3]{1,0}, f32[])")
        16
    """
    arrays = re.findall(r"\b([a-z]+\d+|pred)\[([\d,]*)\]", shape)
    return sum(BYTES[d] * math.prod(map(int, filter(None, dims.split(",")))) for d, dims in arrays)


def computations(text: str) -> dict[str, list[Instruction]]:
    """The instructions of each computation of a program, by name; the first is "ENTRY"."""
    found: dict[str, list[Instruction]] = {}
    line_of = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([a-z][\w\-]*)\((.*?)\)(.*)$")
    current: list[Instruction] = []
    for line in text.splitlines():
        if head := re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line):
            current = found.setdefault("ENTRY" if head[1] else head[2], [])
        elif match := line_of.match(line):
            name, shape, operation, operands, rest = match.groups()
            current.append(
                Instruction(name, shape, operation, re.findall(r"%([\w.\-]+)", operands), rest)
            )
    return found


def moved(instruction: Instruction, known: dict[str, Instruction], program: dict) -> int:
    """Bytes that a kernel reads and writes."""
    inner = program.get(instruction.refers_to("calls"), [])
    if not inner:
        return instruction.bytes + sum(known[name].bytes for name in instruction.operands)
    by_name = {each.name: each for each in inner}
    parameters = [each for each in inner if each.operation == "parameter"]
    total = instruction.bytes
    for parameter in parameters:
        users = [each for each in inner if parameter.name in each.operands]
        updates = [each for each in users if each.operation == "dynamic-update-slice"]
        if users and all(each.operation in SLICES for each in users):
            total += sum(each.bytes for each in users)
        elif updates and len(updates) == len(users):  # in place
            total += sum(2 * by_name[each.operands[1]].bytes - each.bytes for each in updates)
        else:
            total += parameter.bytes
    return total


def kernels(
    program: dict, name: str = "ENTRY", times: float = 1
) -> Iterator[tuple[Any, int, float]]:
    """(instruction, bytes, count) of each kernel; loops of unknown length count once."""
    known = {each.name: each for each in program[name]}
    for each in program[name]:
        if each.operation == "while":
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', each.attributes)
            yield from kernels(
                program, each.refers_to("body"), times * (int(trips[1]) if trips else 1)
            )
        elif each.operation == "call":
            yield from kernels(program, each.refers_to("to_apply"), times)
        elif each.operation not in NO_KERNEL:
            yield each, moved(each, known, program), times


def report(text: str, steps: int) -> dict[str, Any]:
    """Kernels and bytes per step, large copies per step, convolution layouts, loops."""
    program = computations(text)
    found = list(kernels(program))
    kinds: dict[str, float] = collections.defaultdict(float)
    bytes_of: dict[str, float] = collections.defaultdict(float)
    for each, count, times in found:
        target = re.search(r'custom_call_target="([^"]+)"', each.attributes)
        kind = target[1].lstrip("_$") if target else each.operation
        kinds[kind] += times / steps
        bytes_of[kind] += count * times / steps
    copies = [(e, t) for e, _, t in found if e.operation in ("copy", "transpose")]
    labels = re.findall(r'dim_labels=(\w+->\w+), custom_call_target="__cudnn', text)
    loops = [each for body in program.values() for each in body if each.operation == "while"]
    return {
        "kernels_per_step": round(sum(kinds.values()), 2),
        "bytes_per_step": round(sum(bytes_of.values())),
        "kernels": {kind: round(count, 2) for kind, count in kinds.items()},
        "bytes": {kind: round(count) for kind, count in bytes_of.items()},
        "large_copies_per_step": sum(t for e, t in copies if e.bytes > LARGE) / steps,
        "convolution_layouts": dict(collections.Counter(labels)),
        "loops": len(loops),
        "loops_that_ask_the_host": sum("known_trip_count" not in e.attributes for e in loops),
    }


def compiled(function: Callable, *arguments: Any, donate: int | tuple = ()) -> Any:
    """`function` compiled for one H100; `arguments` are pytrees of `jax.ShapeDtypeStruct`s."""
    described = topologies.get_topology_desc("h100", "cuda", target_config=H100, topology="1x1x1")
    mesh = Mesh([described.devices[0]], ("data",))
    place = NamedSharding(mesh, PartitionSpec())
    put = lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place)
    lowered = jax.jit(function, donate_argnums=donate).lower(*jax.tree.map(put, arguments))
    return lowered.compile()


def training(name: str, width: int, batch: int, dtype: Any, steps: int = STEPS) -> dict[str, Any]:
    """`steps` steps in one call on CIFAR-10: momentum, weight decay, average, crops and flips."""
    model = models.build(name, classes=10, width=width, dtype=dtype)
    network = models.from_linen(model)
    tx = optax.chain(optax.add_decayed_weights(5e-4), optax.sgd(0.1, momentum=0.9))
    objective = train.make_objective(network, train.cross_entropy)
    step = train.make_step(objective, tx, ema_decay=0.999)

    def segment(key, state, indices, pixels, labels):
        def fetch(key, idx):
            x = data.crop_and_flip(key, pixels[idx].reshape(-1, 32, 32, 3))
            return Batch(x.astype(jnp.float32) / 255, labels[idx])

        return train.make_segment(step, fetch, unroll=1)(key, state, indices)

    of = jax.ShapeDtypeStruct
    key, images = jax.eval_shape(lambda: jr.key(0)), of((2, 32, 32, 3), jnp.float32)
    state = jax.eval_shape(
        lambda k, x: train.init_state(k, network, tx, x, averaged=True), key, images
    )
    table = (of((50_000, 3072), jnp.uint8), of((50_000,), jnp.int32))
    program = compiled(segment, key, state, of((steps, batch), jnp.int32), *table, donate=1)
    found = report(program.as_text(), steps)
    least = least_bytes(objective, state, batch, jnp.dtype(dtype).itemsize)
    temporary = program.memory_analysis().temp_size_in_bytes
    return found | {"least_bytes_per_step": least, "temporary_bytes": temporary}


def least_bytes(objective: Callable, state: Any, batch: int, itemsize: int) -> int:
    """Lower bound of the bytes of a training step, see the docstring of this module."""
    x: Any = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32)
    y: Any = jax.ShapeDtypeStruct((batch,), jnp.int32)
    traced = jax.make_jaxpr(objective)(state.params, state.stats, Batch(x, y))
    total = 0
    for equation in equations(traced.jaxpr):
        if equation.primitive.name == "conv_general_dilated":
            inputs, kernel = (math.prod(v.aval.shape) for v in equation.invars)
            outputs = math.prod(equation.outvars[0].aval.shape)
            total += 3 * (inputs + kernel + outputs) + 8 * outputs
    weights = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return total * itemsize + 2 * 3 * 4 * weights


def equations(jaxpr: Any) -> Iterator[Any]:
    """All equations of a jaxpr, inner ones included."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            if hasattr(value, "jaxpr"):
                yield from equations(value.jaxpr)


def sweep(problem: str, runs: int, steps: int, records: int = 4) -> dict[str, Any]:
    """`runs` runs of `steps` single-example steps with `records` equally spaced records."""
    toy = problems.PROBLEMS[problem]()
    at = [steps // records * i for i in range(records)]
    probe = train.Probe(lambda state: toy.mean_loss(state.params, toy.train), at)
    run = make_run(toy, steps, [probe])
    keys = jax.eval_shape(lambda: jr.split(jr.key(0), runs))
    sizes = jax.ShapeDtypeStruct((runs,), jnp.float64)
    program = compiled(jax.vmap(run), keys, sizes)
    text = program.as_text()
    bodies = computations(text)
    # The loop over steps is the innermost one of known length; each trip takes `UNROLL` steps.
    loops = [each for body in bodies.values() for each in body if each.operation == "while"]
    inner = [each.refers_to("body") for each in loops if "known_trip_count" in each.attributes]
    counts = [
        sum(1 for _ in kernels(bodies, name))
        for name in inner
        if not any(each.operation == "while" for each in bodies[name])
    ]
    return report(text, steps) | {
        "kernels_per_step": max(counts) / UNROLL,
        "temporary_bytes": program.memory_analysis().temp_size_in_bytes,
    }


def pallas(runs: int, steps: int) -> dict[str, Any]:
    """`steps` steps of `runs` diagonal nets (D1) in the kernel of `pallas_diagonal`."""
    x, y = problems.PROBLEMS["diagonal"]().train
    of = jax.ShapeDtypeStruct
    weights, order = of((runs, x.shape[1]), x.dtype), of((runs, steps), jnp.int32)
    sizes = of((runs,), x.dtype)
    kind = AbstractDevice("NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("data",), (AxisType.Auto,), abstract_device=kind)
    with jax.sharding.use_abstract_mesh(mesh):  # Triton's lowering asks for the device
        arguments = (x, y, weights, weights, order, sizes)
        program = compiled(pallas_diagonal.segment, *arguments)
    temporary = program.memory_analysis().temp_size_in_bytes
    return report(program.as_text(), steps) | {"temporary_bytes": temporary}


def main() -> None:
    """Compiles all programs, prints a line for each and writes the JSON."""
    args = timing.arguments(__doc__, batch_size=256, runs=4096, steps=102_400)
    results: dict[str, Any] = {"nets": {}, "toys": {}}
    for name, width in NETS.items():
        for precision, dtype in {"bf16": jnp.bfloat16, "fp32": jnp.float32}.items():
            found = training(name, width, args.batch_size, dtype)
            results["nets"][f"{name}, {precision}"] = found
            print(
                f"{name:16s} {precision}: {found['kernels_per_step']:6.1f} kernels, "
                f"{found['bytes_per_step'] / 1e9:.2f} GB per step (least "
                f"{found['least_bytes_per_step'] / 1e9:.2f}), {found['large_copies_per_step']:.0f} "
                f"large copies, {found['temporary_bytes'] / 1e6:.0f} MB of temporaries",
                flush=True,
            )
    jax.config.update("jax_enable_x64", True)
    for name in ("diagonal", "two-layer"):
        found = results["toys"][name] = sweep(name, args.runs, args.steps)
        print(
            f"{name:16s} {args.runs} runs: {found['kernels_per_step']:.2f} kernels per step, "
            f"{found['loops_that_ask_the_host']} of {found['loops']} loops ask the host",
            flush=True,
        )
    found = results["toys"]["diagonal, Pallas"] = pallas(args.runs, PALLAS_STEPS)
    print(
        f"Pallas kernel    {args.runs} runs: {found['bytes_per_step'] / args.runs:.1f} bytes per "
        f"step and run, {PALLAS_STEPS} steps in a kernel",
        flush=True,
    )
    versions = ("jax-cuda12-plugin", "nvidia-cudnn-cu12")
    command = f"python -m benchmarks.compiled_gpu --batch_size {args.batch_size} --runs {args.runs}"
    timing.write(args.out, command, versions, device="described: one H100 80GB HBM3", **results)


if __name__ == "__main__":
    main()
