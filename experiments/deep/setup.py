"""What the run of an image classifier is made of: data, network, schedules, compiled steps."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

from experiments.deep.config import Config, assert_possible, colour
from sgd_sparse_jax import data, models, train
from sgd_sparse_jax.types import Batch, Network, Params, Stats

UNAUGMENTED = ("mnist", "gaussians_binary", "uniform_noise")  # as in the released code

UNFLIPPED = ("svhn",)


class Schedules(NamedTuple):
    """Functions of the step."""

    step_size: optax.Schedule
    label_noise: optax.Schedule


class Parts(NamedTuple):
    """What a run is made of, once the data are at hand."""

    model: nn.Module
    network: Network
    schedules: Schedules
    images: data.Images
    test_images: data.Images
    weights: tuple[Params, Stats] | None  # to start from
    num_steps: int  # of this call
    total_steps: int  # of all epochs
    steps_per_epoch: int
    eval_every: int


def validate(config: Config) -> None:
    """Raises ValueError, in the words of the flags, for what can't be run; touches nothing."""
    assert_possible(config)
    network(config, classes=2)
    schedules_of(config, steps_per_epoch=1)


def assemble(config: Config) -> Parts:
    """Opens the data and checks the flags against them."""
    whole, test = (
        data.load_images(config.dataset, split, data_dir=config.data_dir or None)
        for split in ("train", "test")
    )
    classes = len(whole.class_names)
    n = data.share_of(len(whole.images), config.frac_train, "--frac_train")
    n_test = len(test.images) if config.n_final_eval == -1 else config.n_final_eval
    steps_per_epoch = n // config.batch_size
    if steps_per_epoch == 0:
        part = f" ({config.frac_train:g} of them: --frac_train)" if config.frac_train < 1 else ""
        raise ValueError(
            f"--batch_size is {config.batch_size}, more than the {n} training images of "
            f"{config.dataset}{part}; choose {n} or less."
        )
    bn_images = min(config.bn_images, n)
    if bn_images < config.batch_size_eval:
        raise ValueError(
            f"--batch_size_eval is {config.batch_size_eval}, more than the {bn_images} training "
            "images that re-estimate BatchNorm moments; lower it, or raise --bn_images."
        )
    labels = data.corrupt_labels(
        np.asarray(whole.labels[:n]),
        config.p_label_noise,
        classes,
        config.seed,
        data.confusions(config.dataset) if config.noise_type == "asym" else None,
    )
    total = config.epochs * steps_per_epoch
    if config.fork_step >= min(config.max_steps or total, total):
        raise ValueError(
            f"--fork_step is {config.fork_step}, and the run ends at step "
            f"{min(config.max_steps or total, total)}; raise --epochs or --max_steps."
        )
    model = network(config, classes)
    return Parts(
        model=model,
        network=models.from_linen(model),
        schedules=schedules_of(config, steps_per_epoch),
        images=whole._replace(images=whole.images[:n], labels=labels),
        test_images=test._replace(images=test.images[:n_test], labels=test.labels[:n_test]),
        weights=weights_of(config, model, whole.images.shape[1:]),
        num_steps=min(config.max_steps or total, total),
        total_steps=total,
        steps_per_epoch=steps_per_epoch,
        eval_every=5 * steps_per_epoch if config.eval_iter_freq == -1 else config.eval_iter_freq,
    )


def network(config: Config, classes: int) -> nn.Module:
    """The model that the flags name."""
    return models.build(
        config.model,
        classes=classes,
        width=config.model_width,
        dtype=jnp.bfloat16 if config.half_prec else jnp.float32,
        dropout=config.droprate,
        softplus=config.softplus,
    )


def schedules_of(config: Config, steps_per_epoch: int) -> Schedules:
    """Step size and label noise as functions of the step."""
    shape = {"steps_per_epoch": steps_per_epoch, "epochs": config.epochs}
    warmup = {"warmup_factor": config.warmup_factor, "warmup_exp": config.warmup_exp}
    try:
        label_noise = train.released_schedule(config.ln_schedule, config.sgd_p_label_noise, **shape)
    except ValueError as error:
        raise ValueError(f"--ln_schedule: {error}") from error
    step_size = train.released_schedule(config.lr_schedule, config.lr_init, **shape, **warmup)
    return Schedules(step_size, label_noise)


def weights_of(config: Config, model: nn.Module, shape: tuple[int, ...]):
    """The parameters and moments that --model_path names; None without one."""
    if not config.model_path:
        return None
    x = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    stats = dict(jax.eval_shape(model.init, jr.key(0), x))
    try:
        return train.load_weights(config.model_path, stats.pop("params"), stats)
    except ValueError as error:
        raise ValueError(f"--model_path: {error}") from error


def optimizer(config: Config, schedule: optax.Schedule) -> optax.GradientTransformation:
    """Heavy-ball SGD on the loss plus λ/2 |p|², whose gradient passes the momentum too."""
    penalty = optax.add_decayed_weights(config.l2_reg) if config.l2_reg else optax.identity()
    return optax.chain(penalty, optax.sgd(schedule, momentum=config.momentum or None))


def training(config: Config, parts: Parts, mesh: jax.sharding.Mesh, pixels: Batch):
    """The compiled segment, the order of examples, and key -> fresh state."""
    shape = parts.images.images.shape[1:]
    tx = optimizer(config, parts.schedules.step_size)
    objective = train.make_objective(parts.network, train.cross_entropy)
    step = train.make_step(objective, tx, ema_decay=config.swa_tau)
    noise = data.uniform_label_noise(parts.schedules.label_noise, len(parts.images.class_names))
    segment = train.make_segment(
        step,
        fetch(pixels, shape, augmentation(config)),
        shard=train.split_examples(mesh),
        unroll=1,
        noise=noise if config.sgd_p_label_noise else None,
    )
    sampler = train.reshuffled_epochs(len(parts.images.images), config.batch_size)
    x = jnp.zeros((1, *shape), jnp.float32)

    @jax.jit
    def fresh(key):
        state = train.init_state(key, parts.network, tx, x, averaged=True)
        if parts.weights is None:
            return state
        params, stats = parts.weights
        return state._replace(params=params, stats=stats, average=params)

    return segment, sampler, fresh


def placed(images: data.Images, mesh: jax.sharding.Mesh) -> Batch:
    """A data set on every device, its images as rows of the values that are stored.

    A TPU would pad the axes of an image, to four times the bytes, in a copy at every call.
    """
    rows = np.asarray(images.images).reshape(len(images.images), -1)
    arrays: Any = (rows, np.asarray(images.labels))
    return Batch(*train.replicate(arrays, mesh))


def fetch(pixels: Batch, shape: tuple[int, ...], augment: Callable | None = None):
    """Gathers images of `shape` from a data set on the device; bytes become floats in [0, 1]."""

    def gather(key, idx):
        x = pixels.x[idx].reshape(-1, *shape)
        x = augment(key, x) if augment else x
        return Batch(x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x, pixels.y[idx])

    return gather


def augmentation(config: Config) -> Callable | None:
    """Crops and flips where the released code has them."""
    if config.no_data_augm or colour(config) in UNAUGMENTED:
        return None
    return partial(data.crop_and_flip, flip=colour(config) not in UNFLIPPED)
