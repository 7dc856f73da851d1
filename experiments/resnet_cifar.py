"""Image classifiers with large and small step sizes: loss, error and sparsity of every block.

    python -m experiments.resnet_cifar --dataset=cifar10 --lr_init=0.75 \\
        --lr_schedule=piecewise_05epochs --warmup_exp=1.05 --model=resnet18_plain \\
        --model_width=64 --epochs=100 --batch_size=256 --momentum=0.0 --l2_reg=0.0 \\
        --no_data_augm --eval_iter_freq=200 --exp_name=no_explicit_reg

The flags are the released code's. The same command again goes on from the newest checkpoint.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

from experiments import cli, plots, records
from sgd_sparse_jax import data, measure, models, train
from sgd_sparse_jax._types import Batch, TrainState

MAY_CHANGE = ("max_steps", "data_dir", "runs_dir", "debug")


@dataclass(frozen=True)
class Config:
    """Trains an image classifier as the paper's deep experiments do."""

    dataset: str = "cifar10"
    """Data set: cifar10 or cifar100."""
    model: str = "resnet18_plain"
    """Network; resnet18_plain is the paper's."""
    model_width: int = 64
    """Channels of the first stage."""
    epochs: int = 100
    """Length of the run, which the schedule is stretched over."""
    batch_size: int = 128
    """Examples per step, over all devices."""
    lr_init: float = 0.1
    """Initial step size."""
    lr_schedule: str = "piecewise"
    """Step-size schedule by its released name (constant, piecewise_05epochs, cosine, ...)."""
    warmup_factor: float = 1.0
    """Peak of the linear warm-up, as a multiple of lr_init."""
    warmup_exp: float = 1.0
    """Above 1: base of the exponential warm-up; below 1: power of the polynomial one."""
    momentum: float = 0.9
    """Heavy-ball momentum."""
    l2_reg: float = 0.0
    """λ of the penalty λ/2 |p|² over all parameters, inside the loss."""
    no_data_augm: bool = False
    """Train without random crops and flips."""
    swa_tau: float = 0.999
    """Decay of the moving average of the weights, taken at every step."""
    eval_iter_freq: int = 200
    """Steps between evaluations; a checkpoint follows each."""
    max_steps: int = 0
    """Stop after so many steps (0: all epochs); a later call may raise it and goes on."""
    sparsity_images: int = 10_752
    """Training images for training loss, error and sparsity (21 batches of 512)."""
    bn_images: int = 5120
    """Training images that re-estimate the averaged weights' BatchNorm moments."""
    batch_size_eval: int = 512
    """Images per evaluation batch."""
    steps_per_call: int = 0
    """Steps in one compiled call (0: 1 on CPUs, 25 on accelerators)."""
    seed: int = 0
    """Seed of initialization, order of examples and augmentation."""
    exp_name: str = "other"
    """Name of the experiment; the run's folder adds the settings that tell runs apart."""
    data_dir: str = ""
    """Where the data are (else TFDS_DATA_DIR, else ~/tensorflow_datasets)."""
    runs_dir: str = "runs"
    """Where run folders go."""
    debug: bool = False
    """Stop at the first operation that makes a NaN, with a traceback (slow)."""


class Parts(NamedTuple):
    """What a run is made of, once the data are at hand."""

    model: nn.Module
    schedule: optax.Schedule
    images: data.Images
    test_images: data.Images
    num_steps: int
    steps_per_epoch: int
    bn_images: int


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    cli.main(Config, run, argv)


def run(config: Config) -> Path:
    """Trains, or goes on training, in the run's folder; returns the folder."""
    validate(config)
    place = (config.runs_dir, "resnet_cifar", run_name(config))
    saved = train.latest_step(records.run_folder(*place) / "checkpoints")
    parts = assemble(config)
    if saved is not None and saved > parts.num_steps:
        raise ValueError(
            f"--max_steps is {parts.num_steps}, but {records.run_folder(*place)} is at step "
            f"{saved} already; give {saved} or more, or another --exp_name."
        )
    folder = records.open_run(*place, config, may_change=MAY_CHANGE)
    if saved == parts.num_steps:
        print(f"{folder} is at its last step, {saved}, already: its figures are drawn again.")
    else:
        try:
            with jax.debug_nans(config.debug):
                go_on(config, parts, folder)
        except FloatingPointError as error:
            cure = f"--lr_init is {config.lr_init:g}, the run is {folder}"
            raise FloatingPointError(f"{error} ({cure})") from error
    draw(folder, config, parts)
    print_last_row(folder)
    print(folder)
    return folder


def go_on(config: Config, parts: Parts, folder: Path) -> None:
    """Trains from the newest saved state, or from the beginning, to the last step."""
    mesh = train.data_mesh()
    init_key, fit_key = jr.split(jr.key(config.seed))
    pixels, test_pixels = place(parts.images, mesh), place(parts.test_images, mesh)
    segment, sampler, fresh = training(config, parts, mesh, pixels)
    about = {name: value for name, value in asdict(config).items() if name not in MAY_CHANGE}
    with train.open_checkpoints(folder / "checkpoints") as checkpoints:
        state = train.restore(checkpoints, train.replicate(fresh(init_key), mesh), about)
        done = int(state.step)
        records.drop_rows_after(folder, done or -1)  # step 0 is no saved state: its row comes anew
        devices = [f"{device.platform}:{device.device_kind}" for device in jax.devices()]
        records.start_manifest(folder, seed=config.seed, devices=devices, from_step=done)
        with progress_bar(done, parts, config) as (on_call, on_row):
            train.fit(
                fit_key,
                state,
                sampler,
                segment,
                num_steps=parts.num_steps,
                eval_every=config.eval_iter_freq,
                evaluate=evaluation(config, parts, mesh, pixels, test_pixels),
                on_row=lambda row: on_row(add_row(folder, row, parts)),
                save=lambda state: train.save(checkpoints, state, about),
                steps_per_call=steps_per_call(config),
                on_call=on_call,
            )
    records.finish_manifest(folder, steps=parts.num_steps)


def validate(config: Config) -> None:
    """Raises ValueError, in the words of the flags, for what can't be run; touches nothing."""
    whole = ("model_width", "epochs", "batch_size", "eval_iter_freq", "batch_size_eval")
    for field in (*whole, "sparsity_images", "bn_images"):
        if getattr(config, field) < 1:
            raise ValueError(f"--{field} is {getattr(config, field)}; it must be 1 or more.")
    for field in ("max_steps", "steps_per_call", "l2_reg", "momentum"):
        if getattr(config, field) < 0:
            raise ValueError(f"--{field} is {getattr(config, field)}; it must be 0 or more.")
    for field in ("lr_init", "warmup_factor", "warmup_exp"):
        if not 0 < getattr(config, field) < np.inf:
            raise ValueError(f"--{field} is {getattr(config, field)}; it must be positive.")
    if config.momentum >= 1:
        raise ValueError(f"--momentum is {config.momentum}; it must be below 1.")
    if not 0 <= config.swa_tau < 1:
        raise ValueError(f"--swa_tau is {config.swa_tau}; it must be in [0, 1).")
    for field in ("batch_size", "batch_size_eval"):
        if getattr(config, field) % jax.device_count():
            raise ValueError(
                f"--{field} is {getattr(config, field)}, which can't be split over "
                f"{jax.device_count()} devices; choose a multiple of {jax.device_count()}."
            )
    if config.dataset not in data.IMAGE_SETS:
        known = ", ".join(sorted(data.IMAGE_SETS))
        raise ValueError(f"Unknown data set {config.dataset!r} (--dataset); known are {known}.")
    models.build(config.model, classes=1, width=config.model_width)
    schedule_of(config, steps_per_epoch=1)


def assemble(config: Config) -> Parts:
    """Opens the data and checks the flags against them."""
    images, test_images = (
        data.load_images(config.dataset, split, data_dir=config.data_dir or None)
        for split in ("train", "test")
    )
    n = len(images.images)
    steps_per_epoch = n // config.batch_size
    if steps_per_epoch == 0:
        raise ValueError(
            f"--batch_size is {config.batch_size}, more than the {n} training images of "
            f"{config.dataset}; choose {n} or less."
        )
    bn_images = min(config.bn_images, n)
    if bn_images < config.batch_size_eval:
        raise ValueError(
            f"--batch_size_eval is {config.batch_size_eval}, more than the {bn_images} training "
            "images that re-estimate BatchNorm moments; lower it, or raise --bn_images."
        )
    total = config.epochs * steps_per_epoch
    model = models.build(config.model, classes=len(images.class_names), width=config.model_width)
    return Parts(
        model=model,
        schedule=schedule_of(config, steps_per_epoch),
        images=images,
        test_images=test_images,
        num_steps=min(config.max_steps or total, total),
        steps_per_epoch=steps_per_epoch,
        bn_images=bn_images,
    )


def schedule_of(config: Config, steps_per_epoch: int) -> optax.Schedule:
    """The step size as a function of the step."""
    return train.released_schedule(
        config.lr_schedule,
        config.lr_init,
        steps_per_epoch=steps_per_epoch,
        epochs=config.epochs,
        warmup_factor=config.warmup_factor,
        warmup_exp=config.warmup_exp,
    )


def optimizer(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Heavy-ball SGD on the loss plus λ/2 |p|², whose gradient passes the momentum too."""
    penalty = optax.add_decayed_weights(config.l2_reg) if config.l2_reg else optax.identity()
    return optax.chain(penalty, optax.sgd(schedule, momentum=config.momentum or None))


def training(config: Config, parts: Parts, mesh: jax.sharding.Mesh, pixels: Batch):
    """The compiled segment, the order of examples, and key -> fresh state."""
    tx = optimizer(config, parts.schedule)
    step = train.make_step(parts.model, train.cross_entropy, tx, ema_decay=config.swa_tau)
    segment = train.make_segment(
        step,
        fetch_from(pixels, augmented=not config.no_data_augm),
        shard=train.split_examples(mesh),
        unroll=1,
    )
    sampler = train.reshuffled_epochs(len(parts.images.images), config.batch_size)
    shape = parts.images.images.shape[1:]

    @jax.jit
    def fresh(key):
        x = jnp.zeros((1, *shape), jnp.float32)
        return train.init_state(key, parts.model, tx, x, averaged=True)

    return segment, sampler, fresh


def place(images: data.Images, mesh: jax.sharding.Mesh) -> Batch:
    """A data set, as uint8, on every device."""
    placed: Any = (np.asarray(images.images), np.asarray(images.labels))
    return Batch(*train.replicate(placed, mesh))


def fetch_from(pixels: Batch, *, augmented: bool):
    """Gathers from a data set on the device; [0, 1] floats come out."""

    def fetch(key, idx):
        x = pixels.x[idx]
        x = data.crop_and_flip(key, x) if augmented else x
        return Batch(x.astype(jnp.float32) / 255, pixels.y[idx])

    return fetch


def evaluation(
    config: Config, parts: Parts, mesh: jax.sharding.Mesh, pixels: Batch, test_pixels: Batch
) -> Callable[[TrainState], dict[str, Any]]:
    """State -> a row: one forward pass over training images, one over the test set per weights."""
    key = jr.key(config.seed)
    block_keys = {f"block{i}": jr.fold_in(key, i) for i in range(1, 10)}
    plain = fetch_from(pixels, augmented=False)
    placed = {"batch": config.batch_size_eval, "shard": train.split_examples(mesh)}
    on_train = measure.make_evaluation(
        parts.model,
        train.cross_entropy,
        plain,
        sample=lambda block, phi: measure.sample_units(block_keys[block], phi),
        sparsity=measure.feature_sparsity,
        **placed,
    )
    test_fetch = fetch_from(test_pixels, augmented=False)
    on_test = measure.make_evaluation(parts.model, train.cross_entropy, test_fetch, **placed)
    moments = measure.make_moments(parts.model.clone(norm_momentum=0.0), plain, **placed)
    n_train, n_test = len(pixels.y), len(test_pixels.y)

    def evaluate(state: TrainState) -> dict[str, Any]:
        started = time.perf_counter()
        on = {
            "train": on_train(key, state.params, state.stats, min(config.sparsity_images, n_train))
        }
        on["test"] = on_test(key, state.params, state.stats, n_test)
        stats = moments(key, state.average, state.stats, parts.bn_images)
        on["test_average"] = on_test(key, state.average, stats, n_test)
        row = {
            f"{where}/{name}": value for where, part in on.items() for name, value in part.items()
        }
        return row | {"eval_seconds": time.perf_counter() - started}

    return evaluate


def steps_per_call(config: Config) -> int:
    """Convolutions inside a compiled loop are 16-29 times slower on CPUs (jax issue 12868)."""
    return config.steps_per_call or (1 if jax.default_backend() == "cpu" else 25)


def run_name(config: Config) -> str:
    """Runs of one experiment that differ in what the paper varies get folders of their own."""
    return (
        f"{config.exp_name}-{config.dataset}-{config.model}-w{config.model_width}"
        f"-lr{config.lr_init:g}-{config.lr_schedule}-seed{config.seed}"
    )


def add_row(folder: Path, row: dict[str, Any], parts: Parts) -> dict[str, Any]:
    """Completes a row with epoch and step size, and writes it."""
    step = row["step"]
    place = {
        "step": step,
        "epoch": step / parts.steps_per_epoch,
        "lr": np.asarray(parts.schedule(step)),
    }
    records.append_row(folder, place | row)
    return row


@contextlib.contextmanager
def progress_bar(done: int, parts: Parts, config: Config) -> Iterator[tuple[Callable, Callable]]:
    """A bar over steps with the last row's numbers; yields (on_call, on_row)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), "{task.description}", TimeRemainingColumn())
    with Progress(*columns) as progress:
        task = progress.add_task("compiling", total=parts.num_steps, completed=done)
        since, last = [done, time.perf_counter()], [""]

        def on_call(step: int) -> None:
            rate = (step - since[0]) * config.batch_size / (time.perf_counter() - since[1])
            progress.update(task, completed=step, description=f"{rate:.0f} images/s {last[0]}")

        def on_row(row: dict[str, Any]) -> None:
            share = " / ".join(f"{row[f'train/distinct/{block}']:.0%}" for block in blocks(row))
            last[0] = (
                f"loss {row['train/loss']:.4f}, test error {row['test/error']:.2%}, active {share}"
            )
            progress.console.print(f"step {row['step']}: {last[0]}")
            since[:] = row["step"], time.perf_counter()  # evaluations are no training time

        yield on_call, on_row


def draw(folder: Path, config: Config, parts: Parts) -> list[Path]:
    """Loss, error, step size and the sparsity of every block along the run."""
    rows = records.read_rows(folder)
    if not rows:
        raise ValueError(f"{folder} has lost its metrics.jsonl; remove that folder and run again.")
    epochs = np.array([row["epoch"] for row in rows])
    column = lambda name: np.array([row[name] for row in rows], float)
    curves = lambda names: {label: (epochs, column(name)) for label, name in names.items()}
    distinct = {block: f"train/distinct/{block}" for block in blocks(rows[0])}
    active = {block: f"train/active/{block}" for block in blocks(rows[0])}
    panels = [
        plots.Panel(
            "Cross-entropy",
            "nats",
            curves({"training images": "train/loss", "test images": "test/loss"}),
            xlabel="epoch",
            log_y=True,
        ),
        plots.Panel(
            "Error",
            "share of images",
            curves(
                {
                    "training images": "train/error",
                    "test images": "test/error",
                    "test images, averaged weights": "test_average/error",
                }
            ),
            xlabel="epoch",
        ),
        plots.Panel("Active units, without duplicates", "share", curves(distinct), xlabel="epoch"),
        plots.Panel("Active units, all", "share", curves(active), xlabel="epoch"),
    ]
    title = (
        f"{config.dataset}, {config.model} of width {config.model_width}, "
        f"η₀ = {config.lr_init:g}, {config.lr_schedule}"
    )
    return plots.figure(folder / "figures" / "resnet_cifar", panels, title=title)


def blocks(row: dict[str, Any]) -> list[str]:
    """The blocks that a row has the sparsity of, in depth order."""
    head = "train/distinct/"
    return [name.removeprefix(head) for name in row if name.startswith(head)]


def print_last_row(folder: Path) -> None:
    """The last evaluation, in a line or two."""
    row = records.read_rows(folder)[-1]
    sparsity = " / ".join(f"{row[f'train/distinct/{block}']:.1%}" for block in blocks(row))
    print(
        f"step {row['step']}: train loss {row['train/loss']:.4f}, train error "
        f"{row['train/error']:.2%}, test error {row['test/error']:.2%} (averaged weights "
        f"{row['test_average/error']:.2%})\n"
        f"active units without duplicates, block by block: {sparsity}"
    )


if __name__ == "__main__":
    main()
