"""Image classifiers: training step, epoch and evaluation, in JAX and in PyTorch, alternating.

    python -m benchmarks.deep --nets resnet18_plain wrn28 densenet100_12 --batch_size 256 \\
        --precision bf16 --out benchmarks/results/deep.json

Both sides: random 32 x 32 images as uint8 on the device, crops and flips, cross-entropy, SGD with
momentum 0.9 and an L2 penalty of 5e-4, a moving average of the weights. JAX runs the program of
`experiments.resnet_cifar`. PyTorch's is channels-last, compiled if possible, and under autocast at
bf16. At fp32, both multiply in tf32 on recent NVIDIA GPUs, as JAX does by default.

FLOP/s count convolutions and the last layer by a formula (`peaks.step_flop`) for both sides; XLA's
count for the compiled step is printed too. Drawing the order of examples is part of an epoch, not a
step. Two idle CPU cores take half a minute for `--nets resnet18_plain --width 8
--batch_size 16 --rounds 1`.
"""

import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

# Both frameworks share one process: neither may allocate the whole memory of the device.
os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.45")

import jax
import jax.random as jr
import numpy as np

from benchmarks import peaks, timing
from benchmarks.deep_plan import EVAL_BATCH, SHAPE, Config, Plan, command, complete, validate
from benchmarks.deep_sides import Side, Training, jax_side, memory_peak, torch_device, torch_sides
from benchmarks.deep_table import show
from experiments.launch import cli, devices
from sgd_sparse_jax import measure, train


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.main(Config, run, argv)


def run(config: Config) -> dict[str, Any]:
    """Measures every network; prints a table and writes all results after each."""
    devices.set_up_deep(deterministic=False)
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


def measure_ceilings(plan: Plan) -> dict[str, float | int]:
    """Peak rates of one device; the better framework counts for matrix products."""
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


def measure_net(name: str, plan: Plan, ceilings: Mapping[str, float]) -> dict[str, Any]:
    """One network: alternating steps of all sides, then our epoch and our evaluation."""
    before = memory_peak()
    training = Training(name, plan)
    print(f"-- {name}", flush=True)
    sides = {f"JAX, {k} per call": jax_side(training, k) for k in plan.calls}
    peak = memory_peak()
    torch_of, failed = torch_sides(name, plan)
    flop = peaks.step_flop(training.model, (plan.config.batch_size, *SHAPE))
    rows = timed(sides | torch_of, flop, plan, ceilings)
    best = min(plan.calls, key=lambda k: rows[f"JAX, {k} per call"]["ms_per_step"])
    chosen = rows[f"JAX, {best} per call"]
    return {
        "width": plan.config.width or "default",
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(training.state.params)),
        "step_flop": flop,
        "sides": rows,
        "torch_failed": failed,
        # Known only if this network raised it: the peak is per process.
        "our_peak_bytes": peak if peak > before else None,
        "floors": floors(flop, rows, ceilings),
        "evaluation": evaluation(training),
        "epoch": epoch(training, best, chosen["ms_per_step"]),
    }


def timed(
    sides: Mapping[str, Side], flop: int, plan: Plan, ceilings: Mapping[str, float]
) -> dict[str, dict[str, Any]]:
    """Times all sides alternately; a row each: medians over rounds, rates, shares of the peak."""
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
    """Lower bounds of a step's time: its operations, and XLA's count of bytes, at peak rates."""
    row = sides.get("JAX, 1 per call", {})
    moved, counted = row.get("xla_bytes"), row.get("xla_flop")
    devices = jax.device_count()  # XLA counts per device
    return {
        "operations_ms": 1e3 * flop / ceilings["matmul_flop_per_s"] / devices,
        "memory_ms": moved and 1e3 * moved / ceilings["memory_bytes_per_s"],
        "xla_step_gflop": counted and counted * devices / 1e9,
    }


def epoch(training: Training, per_call: int, ms_per_step: float) -> dict[str, Any]:
    """The second of two epochs of `train.windows`, including order, losses and checks of states."""
    stops = (training.per_epoch, 2 * training.per_epoch)
    run = train.windows(
        *(jr.key(2), training.start(), training.sampler, training.segment, stops),
        steps_per_call=per_call,
    )
    stamps = [time.perf_counter() for _ in run]
    seconds = stamps[1] - stamps[0]
    return {
        "seconds": seconds,
        "steps": training.per_epoch,
        "steps_per_call": per_call,
        "over_steps": seconds / (1e-3 * ms_per_step * training.per_epoch),
    }


def evaluation(training: Training) -> dict[str, Any]:
    """An evaluation, without and with sparsity, and its forward passes alone."""
    key, n = jr.key(3), len(training.plan.test_images.labels)
    devices, shard = jax.device_count(), train.split_examples(training.mesh)
    batch = math.ceil(min(EVAL_BATCH, n) / devices) * devices
    fetch = training.fetch_from(training.plan.test_images, augmented=False)
    make = partial(
        measure.make_evaluation,
        training.network,
        train.cross_entropy,
        fetch,
        batch=batch,
        shard=shard,
    )
    sparsity = make(
        sample=lambda block, phi: measure.sample_units(key, phi),
        distinct=lambda units: measure.feature_sparsity(units)[1],
    )

    @jax.jit
    def forward(params, stats, idx):
        return training.network.apply(params, stats, fetch(key, shard(idx)).x).out

    state, rows = training.state, [np.arange(k, k + batch) % n for k in range(0, n, batch)]
    passes = lambda: [forward(state.params, state.stats, idx.astype(np.int32)) for idx in rows]
    evaluations = {"evaluation": make(), "with_sparsity": sparsity}
    sides = {"forward": lambda: jax.block_until_ready(passes())} | {
        name: partial(evaluate, key, state.params, state.stats, n)
        for name, evaluate in evaluations.items()
    }
    seconds = timing.rounds(sides, training.plan.config.rounds)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    over = {f"{name}_over_forward": middle[name] / middle["forward"] for name in evaluations}
    return {"images": n} | {f"{name}_s": value for name, value in middle.items()} | over


if __name__ == "__main__":
    main()
