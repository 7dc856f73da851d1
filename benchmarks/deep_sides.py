"""The sides of `benchmarks.deep`: training of a network in JAX and in PyTorch."""

import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.tree_util import Partial

from benchmarks.deep_plan import (
    AVERAGE_DECAY,
    CLASSES,
    L2,
    MOMENTUM,
    SHAPE,
    STEP_SIZE,
    TORCH_NETS,
    Plan,
)
from experiments.deep import setup
from sgd_sparse_jax import data, models, train
from sgd_sparse_jax.types import Fetch, TrainState


class Side(NamedTuple):
    """A side of the comparison: `run()` executes `steps` training steps and waits for the last."""

    run: Callable[[], object]
    steps: int
    devices: int
    facts: dict[str, Any]


class Training:
    """Training of one network in JAX, composed as in `experiments.resnet_cifar`."""

    def __init__(self, name: str, plan: Plan):
        batch, width = plan.config.batch_size, plan.config.width or None
        self.plan, self.per_epoch = plan, len(plan.images.labels) // batch
        self.model = models.build(name, classes=CLASSES, width=width, dtype=plan.dtype)
        self.network = models.from_linen(self.model)
        self.mesh = train.data_mesh()
        tx = optax.chain(optax.add_decayed_weights(L2), optax.sgd(STEP_SIZE, MOMENTUM))
        objective = train.make_objective(self.network, train.cross_entropy)
        step = train.make_step(objective, tx, ema_decay=AVERAGE_DECAY)
        shard = train.split_examples(self.mesh)
        of = lambda fetch, *args: train.make_segment(step, fetch, shard, unroll=1)(*args)
        # Pixels are an argument, as in a run: XLA takes seconds over constants of their size.
        self.segment = Partial(of, self.fetch_from(plan.images, augmented=True))
        self.sampler = train.reshuffled_epochs(len(plan.images.labels), batch)
        x = jnp.zeros((1, *SHAPE), jnp.float32)
        init = partial(train.init_state, network=self.network, tx=tx, x=x, averaged=True)
        self.fresh = jax.jit(init)
        self.state = self.start()

    def start(self) -> TrainState:
        """A fresh state on every device."""
        return train.replicate(self.fresh(jr.key(0)), self.mesh)

    def fetch_from(self, images: data.Images, *, augmented: bool) -> Fetch:
        """A function that gathers from images on every device, as in a run."""
        pixels = setup.placed(images, self.mesh)
        return setup.make_fetch(pixels, SHAPE, data.crop_and_flip if augmented else None)


def memory_peak() -> int:
    """Peak bytes of this process on a device so far, including autotuning; 0 if not known."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def jax_side(training: Training, per_call: int) -> Side:
    """Calls of `per_call` steps, compiled here, with a precomputed order of examples."""
    plan, key = training.plan, jr.key(1)
    count = math.ceil(plan.steps / per_call)
    draw = jax.jit(training.sampler, static_argnums=2)
    calls = np.asarray(draw(key, 0, count * per_call)).reshape(count, per_call, -1)
    advance = jax.jit(lambda segment, *args: segment(*args), donate_argnums=2)

    def some(indices: np.ndarray) -> None:
        for rows in indices:
            training.state, _ = advance(training.segment, key, training.state, rows)
        jax.block_until_ready(training.state)

    begin = time.perf_counter()
    first = training.segment, key, training.state, calls[0]
    compiled = advance.lower(*first).compile()  # jit reuses it
    facts = {"compile_s": time.perf_counter() - begin}
    some(calls[:1])
    facts |= {"first_call_s": time.perf_counter() - begin}
    facts |= counted_by_xla(compiled, per_call)
    print(
        f"JAX, {per_call} per call: first call done after {facts['first_call_s']:.1f} s",
        flush=True,
    )
    return Side(lambda: some(calls), count * per_call, jax.device_count(), facts)


def counted_by_xla(compiled: Any, per_call: int) -> dict[str, Any]:
    """Memory of a program on one device; operations and bytes if it is a single step.

    XLA counts the body of a loop once, or as often as it is unrolled.
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


def torch_device() -> str:
    """PyTorch's name of the device on which JAX runs."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def torch_sides(name: str, plan: Plan) -> tuple[dict[str, Side], dict[str, str]]:
    """(PyTorch in every mode that works, else eager; errors of the others)."""
    sides: dict[str, Side] = {}
    failed: dict[str, str] = {}
    if plan.no_torch or name not in TORCH_NETS:
        return sides, failed
    for mode in dict.fromkeys((*plan.torch_modes, "eager")):
        if sides and mode not in plan.torch_modes:
            continue  # eager is the last resort
        try:
            sides[f"torch, {mode}"] = torch_side(name, mode, plan)
        except Exception as error:  # compilers raise many types
            failed[mode] = f"{type(error).__name__}: {error}".splitlines()[0]
    return sides, failed


def torch_side(name: str, mode: str, plan: Plan) -> Side:
    """PyTorch's steps on one device, compiled here by three of them."""
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
    steps(2)  # allocates momentum and records CUDA graphs
    if device == "cuda":
        facts["memory_bytes"] = torch.cuda.max_memory_allocated() - before
    return Side(lambda: steps(plan.steps), plan.steps, 1, facts)
