"""The plan of a run: everything that follows from its flags and its data, resolved once.

`workbench` compiles the functions of a plan; `training` runs them and records `metrics`.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import Partial

from experiments.deep import config as flags
from experiments.deep.config import Config
from sgd_sparse_jax import data, models, train, types
from sgd_sparse_jax.types import Batch, Fetch

UNAUGMENTED = ("mnist", "gaussians_binary", "uniform_noise")  # as in the released code
UNFLIPPED = ("svhn",)
Weights = tuple[types.Params, types.Stats]
sampler_of = functools.cache(train.reshuffled_epochs)  # one function, hence one compilation


@dataclasses.dataclass(frozen=True)
class Plan:
    """A run, resolved from its flags and data."""

    config: Config  # as given; compared with config.json
    folder: Path
    about: dict[str, Any]  # flags and `about_data`; compared with saved states
    about_data: dict[str, Any]  # fingerprints of the whole data set
    images: data.Images  # the training set, after --frac_train and --p_label_noise
    test_images: data.Images
    model: nn.Module
    network: types.Network
    weights: Weights | None  # initial weights that replace random ones
    parent: Path | None  # the saved state to fork from
    step_size: optax.Schedule  # of `tx`; recorded
    tx: optax.GradientTransformation
    label_noise: optax.Schedule  # the share of labels to resample
    sampler: types.Sampler
    init_key: types.PRNGKey
    train_key: types.PRNGKey
    steps_per_epoch: int
    total_steps: int  # of all epochs
    num_steps: int  # where this command stops
    evaluations: frozenset[int]  # steps
    curvature: frozenset[int]  # those of them with curvature
    saved_steps: frozenset[int]  # whose states are saved under models/
    steps_per_call: int


def validate(config: Config) -> None:
    """Raises ValueError for flags that are invalid for any data; reads and writes nothing."""
    flags.check(config)
    build(config, classes=2)  # checks the model and its options
    schedules(config, steps_per_epoch=1)
    with naming("runs_dir or --exp_name"):
        train.checkpoint_path(flags.folder_of(config))
    with naming("fork_from"):
        train.checkpoint_path(config.fork_from)


def resolve(config: Config) -> Plan:
    """Resolves valid flags, for which it opens the data; writes nothing.

    Raises ValueError or OSError, naming the flag, for flags that don't fit the data.
    """
    folder = flags.folder_of(config)
    with naming("dataset"):
        where = config.data_dir or None
        whole = data.load_images(config.dataset, "train", data_dir=where)
        test = data.load_images(config.dataset, "test", data_dir=where)
    if whole.images.shape[1:] != test.images.shape[1:]:
        sizes = [" x ".join(map(str, each.images.shape[1:])) for each in (whole, test)]
        raise ValueError(
            f"--dataset is {config.dataset}, whose training images are {sizes[0]} and whose test "
            f"images are {sizes[1]}; give them one size."
        )
    images = training_set(config, whole)
    n, classes, found = len(images.labels), len(images.class_names), fingerprints(whole, test)
    if n < config.batch_size:
        raise ValueError(
            f"--batch_size is {config.batch_size}, more than the {n} training images of "
            f"{config.dataset} (--frac_train {config.frac_train:g}); choose {n} or less."
        )
    steps_per_epoch = n // config.batch_size
    total_steps = config.epochs * steps_per_epoch
    num_steps = min(config.max_steps or total_steps, total_steps)
    if config.fork_step >= num_steps:
        raise ValueError(
            f"--fork_step is {config.fork_step}, but the run ends at step {num_steps}; raise "
            "--epochs or --max_steps."
        )
    if config.bn_images < jax.device_count():
        raise ValueError(f"--bn_images is {config.bn_images}; each device needs at least one.")
    model = build(config, classes)
    network = models.from_linen(model)
    step_size, label_noise = schedules(config, steps_per_epoch)
    # Split all at once: in JAX, fold_in(key, 1) is split(key)[1].
    init_key, train_key, _ = jr.split(jr.key(config.seed), 3)
    eval_every = 5 * steps_per_epoch if config.eval_iter_freq == -1 else config.eval_iter_freq
    keep_every = config.save_model_each_k_epochs * steps_per_epoch
    curved = curvature_steps(config, n, eval_every, num_steps)
    n_test = None if config.n_final_eval == -1 else config.n_final_eval
    is_new = train.latest_step(folder / "checkpoints") is None  # else a saved state is restored
    return Plan(
        config=config,
        folder=folder,
        about={k: v for k, v in dataclasses.asdict(config).items() if k not in flags.MAY_CHANGE}
        | found,
        about_data=found,
        images=images,
        test_images=test._replace(images=test.images[:n_test], labels=test.labels[:n_test]),
        model=model,
        network=network,
        weights=weights(config, network, whole.images.shape[1:]) if is_new else None,
        parent=parent_state(config) if is_new else None,
        step_size=step_size,
        tx=optimizer(step_size, config.momentum or None, config.l2_reg or None),
        label_noise=label_noise,
        sampler=sampler_of(n, config.batch_size),
        init_key=init_key,
        train_key=train_key,
        steps_per_epoch=steps_per_epoch,
        total_steps=total_steps,
        num_steps=num_steps,
        evaluations=frozenset({*range(0, num_steps, eval_every), num_steps}),  # first and last
        curvature=curved,
        saved_steps=frozenset(range(keep_every, num_steps + 1, keep_every) if keep_every else ()),
        # Convolutions inside a compiled loop are 16-29 times slower on CPUs (jax issue 12868).
        steps_per_call=config.steps_per_call or (1 if jax.default_backend() == "cpu" else 25),
    )


@contextlib.contextmanager
def naming(flag: str) -> Iterator[None]:
    """Prefixes the message of a ValueError with the name of a flag."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"--{flag}: {error}") from error


def training_set(config: Config, whole: data.Images) -> data.Images:
    """The first --frac_train of the training set, with --p_label_noise of its labels wrong."""
    n = data.share_of(len(whole.images), config.frac_train, "--frac_train")
    labels = data.corrupt_labels(
        np.asarray(whole.labels[:n]),
        config.p_label_noise,
        len(whole.class_names),
        config.seed,
        data.confusions(config.dataset) if config.noise_type == "asym" else None,
    )
    return whole._replace(images=whole.images[:n], labels=labels)


def curvature_steps(config: Config, n: int, eval_every: int, num_steps: int) -> frozenset[int]:
    """The evaluations with curvature, of a run on n images."""
    every, examples = config.curvature_every, config.curvature_examples
    if not every:
        return frozenset()
    if every % eval_every:
        raise ValueError(
            f"--curvature_every is {every}; choose a multiple of {eval_every}, the steps between "
            f"evaluations (--eval_iter_freq)."
        )
    if examples > n:
        raise ValueError(
            f"--curvature_examples is {examples}, more than the {n} training images; choose "
            f"{n - n % jax.device_count()} or less."
        )
    return frozenset({config.fork_step, *range(0, num_steps, every), num_steps})


def fingerprints(images: data.Images, test_images: data.Images) -> dict[str, Any]:
    """Fingerprints of the whole data set, as JSON values."""
    parts = {"train": data.fingerprint(images), "test": data.fingerprint(test_images)}
    return {
        f"{split} data, {name}": value
        for split, part in parts.items()
        for name, value in part.items()
        if value != ""
    }


def build(config: Config, classes: int) -> nn.Module:
    """The model that the flags name."""
    with naming("model"):
        return models.build(
            config.model,
            classes=classes,
            width=config.model_width,
            dtype=jnp.bfloat16 if config.half_prec else jnp.float32,
            dropout=config.droprate,
            softplus=config.softplus,
        )


def network_of(config: Config) -> tuple[types.Network, tuple[int, ...]]:
    """The network that the flags name, and the shape [h, w, c] of its images.

    Opens the data only of --dataset=path:FOLDER, whose size and classes are found there.
    """
    if config.dataset.startswith(data.PATH):
        with naming("dataset"):
            images = data.load_images(config.dataset, "train", data_dir=config.data_dir or None)
        classes, shape = len(images.class_names), images.images.shape[1:]
    elif config.dataset in data.IMAGE_SETS:
        shape, names, _ = data.IMAGE_SETS[config.dataset]
        classes = len(names)
    else:
        names = ", ".join(data.IMAGE_SETS)
        raise ValueError(f"--dataset is {config.dataset}; choose path:FOLDER or one of {names}.")
    return models.from_linen(build(config, classes)), shape


def schedules(config: Config, steps_per_epoch: int) -> tuple[optax.Schedule, optax.Schedule]:
    """Step size and share of resampled labels, as functions of the step."""
    shape = {"steps_per_epoch": steps_per_epoch, "epochs": config.epochs}
    warmup = {"warmup_factor": config.warmup_factor, "warmup_exp": config.warmup_exp}
    with naming("lr_schedule"):
        step_size = train.released_schedule(config.lr_schedule, config.lr_init, **shape, **warmup)
    with naming("ln_schedule"):
        label_noise = train.released_schedule(config.ln_schedule, config.sgd_p_label_noise, **shape)
    return step_size, label_noise


def optimizer(
    step_size: optax.Schedule, momentum: Any, l2_reg: Any
) -> optax.GradientTransformation:
    """Heavy-ball SGD on the loss plus λ/2 |p|², with the penalty inside the momentum.

    `momentum` and λ, `l2_reg`, may be traced; None omits the term.
    """
    penalty = optax.identity() if l2_reg is None else optax.add_decayed_weights(l2_reg)
    return optax.chain(penalty, optax.sgd(step_size, momentum))


def weights(config: Config, network: types.Network, shape: tuple[int, ...]) -> Weights | None:
    """The parameters and statistics that --model_path names; None without one."""
    if not config.model_path:
        return None
    with naming("model_path"):
        return load_weights(config.model_path, network, shape)


def load_weights(path: str | Path, network: types.Network, shape: tuple[int, ...]) -> Weights:
    """The saved parameters and statistics of a network for images of `shape`, on all devices."""
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    return train.load_weights(path, *on_all_devices(jax.eval_shape(network.init, jr.key(0), x)))


def parent_state(config: Config) -> Path | None:
    """The saved state that --fork_from and --fork_step name; None without them."""
    if not config.fork_from:
        return None
    run = train.checkpoint_path(config.fork_from)
    places = [run / name / str(config.fork_step) for name in ("checkpoints", "models")]
    if not any(place.is_dir() for place in places):
        raise ValueError(f"--fork_from: there is no saved state {places[0]}, nor {places[1]}.")
    return next(place for place in places if place.is_dir())


def on_all_devices(shapes: Any) -> Any:
    """`jax.ShapeDtypeStruct`s of arrays replicated over all devices."""
    place = NamedSharding(train.data_mesh(), PartitionSpec())
    put = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place)
    return jax.tree.map(put, shapes)


def augmentation(config: Config) -> Callable | None:
    """Crops and flips for the data sets that the released code augments."""
    base = config.dataset.removesuffix("_gs")
    if config.no_data_augm or base in UNAUGMENTED:
        return None
    return partial(data.crop_and_flip, flip=base not in UNFLIPPED)


def placed(images: data.Images, mesh: jax.sharding.Mesh) -> Batch:
    """Copies a data set to every device, each image as a flat row."""
    # A TPU would pad the axes of an image, to four times the bytes, in a copy at every call.
    rows = np.asarray(images.images).reshape(len(images.images), -1)
    arrays: Any = (rows, np.asarray(images.labels))
    return Batch(*train.replicate(arrays, mesh))


def make_fetch(pixels: Batch, shape: tuple[int, ...], augment: Callable | None = None) -> Fetch:
    """Gathers images of `shape` from a data set on the device; bytes become floats in [0, 1].

    The pixels are arguments of what is compiled: as a constant, XLA takes 11 s over CIFAR-10.
    """

    def gather(pixels, key, idx):
        x = pixels.x[idx].reshape(-1, *shape)
        x = augment(key, x) if augment else x
        return Batch(x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x, pixels.y[idx])

    return Partial(gather, pixels)
