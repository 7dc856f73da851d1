"""A run that trains an image classifier: its flags, its parts, and the way through it."""

import contextlib
import dataclasses
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax

from experiments import devices, gauges, hosts, progress, records
from experiments.hosts import ALONE, Hosts
from experiments.signals import Asked, Stopped, deferred
from sgd_sparse_jax import data, models, train
from sgd_sparse_jax._types import Batch, Params, Stats, TrainState

MAY_CHANGE = (
    *("max_steps", "save_every_seconds", "keep", "data_dir", "runs_dir", "debug", "tensorboard"),
    "hosts",
)
TIMES = ("step_seconds", "eval_seconds", "images_per_second")
UNAUGMENTED = ("mnist", "gaussians_binary", "uniform_noise")  # as in the released code
UNFLIPPED = ("svhn",)
CONFUSIONS = {
    "cifar10": data.CIFAR10_CONFUSIONS,
    "cifar100": {c: (c + 1) % 100 for c in range(100)},
    "svhn": {c: (c + 1) % 10 for c in range(10)},
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains an image classifier as the paper's deep experiments do."""

    dataset: str = "cifar10"
    """Data set: cifar10, cifar100, svhn, mnist, fashion_mnist, tiny_imagenet, cifar10_horse_car,
    cifar10_dog_cat, gaussians_binary, uniform_noise; NAME_gs for grey-scale."""
    frac_train: float = 1.0
    """Share of the training set to use: its first part."""
    p_label_noise: float = 0.0
    """Share of training labels that are wrong from the start."""
    noise_type: Literal["sym", "asym"] = "sym"
    """Wrong labels: sym, uniform among the others; asym, what the class is mistaken for."""
    sgd_p_label_noise: float = 0.0
    """Share of each batch's labels drawn anew, uniform over all classes, at every step."""
    ln_schedule: str = "constant"
    """Schedule of sgd_p_label_noise, by the names of lr_schedule."""
    no_data_augm: bool = False
    """Train without random crops and flips."""
    model: str = "resnet18_plain"
    """Network: resnet18_plain (the paper's), resnet18, resnet18_gn, resnet34, resnet34_gn,
    resnet34preact, resnet_tiny, resnet_tiny_gn, wrn28, vgg16, densenet100_12."""
    model_width: int = 64
    """Channels of the first stage; the widening factor of wrn28, the growth of densenet100_12."""
    half_prec: bool = False
    """Compute in bfloat16; parameters, norms and loss stay in float32."""
    droprate: float = 0.0
    """Share dropped inside the blocks of pre-activation networks."""
    softplus: int = 0
    """Beta of softplus in place of ReLU in pre-activation networks (0: ReLU)."""
    model_path: str = ""
    """Start from the weights of this run folder, or of one of its saved states."""
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
    swa_tau: float = 0.999
    """Decay of the moving average of the weights, taken at every step."""
    eval_iter_freq: int = -1
    """Steps between evaluations, a checkpoint follows each; -1: every 5 epochs."""
    batch_size_eval: int = 512
    """Images per evaluation batch."""
    n_final_eval: int = 10_000
    """Test images that an evaluation sees (-1: all)."""
    sparsity_images: int = 10_752
    """Training images for training loss, error and sparsity (21 batches of 512)."""
    bn_images: int = 5120
    """Training images for the averaged weights' BatchNorm moments; after all epochs, all."""
    jacobian_examples: int = 0
    """Training images for the rank of the Jacobian, in float64 (0: no rank; slow above 50)."""
    jacobian_tol: float = 1e-4
    """The rank counts singular values above this multiple of the largest."""
    save_model_each_k_epochs: int = 0
    """Keep the state of every k-th epoch under models/ (0: the newest checkpoints only)."""
    max_steps: int = 0
    """Stop after so many steps (0: all epochs); a later call may raise it and goes on."""
    save_every_seconds: float = 300.0
    """Between evaluations, seconds from one checkpoint to the next (0: after every call)."""
    keep: int = 2
    """How many of the newest checkpoints stay."""
    fork_from: str = ""
    """Begin at a saved state of this run folder, which may have had other settings."""
    fork_step: int = 0
    """The step of that state; steps are counted on from there."""
    steps_per_call: int = 0
    """Steps in one compiled call (0: 1 on CPUs, 25 on accelerators)."""
    deterministic: bool = False
    """Two runs of one command give the same metrics, byte for byte: times are left out, and
    accelerators sum in a fixed order."""
    seed: int = 0
    """Seed of initialization, order of examples, augmentation and label noise."""
    exp_name: str = "other"
    """Name of the experiment; the run's folder adds the settings that tell runs apart."""
    data_dir: str = ""
    """Where the data are (else TFDS_DATA_DIR, else ~/tensorflow_datasets)."""
    runs_dir: str = "runs"
    """Where run folders go."""
    tensorboard: bool = False
    """Write the rows for TensorBoard too, under tensorboard/ in the run's folder."""
    debug: bool = False
    """Stop at the first operation that makes a NaN, with a traceback (slow)."""
    hosts: Hosts = ALONE


class Schedules(NamedTuple):
    """Functions of the step."""

    step_size: optax.Schedule
    label_noise: optax.Schedule


class Parts(NamedTuple):
    """What a run is made of, once the data are at hand."""

    model: nn.Module
    schedules: Schedules
    images: data.Images
    test_images: data.Images
    weights: tuple[Params, Stats] | None  # to start from
    num_steps: int  # of this call
    total_steps: int  # of all epochs
    steps_per_epoch: int
    eval_every: int


def run(config: Config) -> Path:
    """Trains, or goes on training, in the run's folder; returns the folder."""
    hosts.join(config.hosts)
    devices.set_up_deep(deterministic=config.deterministic)
    validate(config)
    folder = records.run_folder(*place_of(config))
    with hosts.together(folder), deferred() as asked:
        saved = train.latest_step(folder / "checkpoints")
        parts = assemble(config)
        if saved is not None and saved > parts.num_steps:
            raise ValueError(
                f"--max_steps is {parts.num_steps}, but {folder} is at step {saved} already; give "
                f"{saved} or more, or another --exp_name."
            )
        if config.fork_from and saved is None:
            train.state_folder(config.fork_from, config.fork_step)
        hosts.on_first(lambda: records.open_run(*place_of(config), config, may_change=MAY_CHANGE))
        if saved == parts.num_steps:
            print(f"{folder} is at its last step, {saved}, already.")
            return folder
        with jax.debug_nans(config.debug), failures_named(config, folder):
            go_on(config, parts, folder, asked)
    return folder


@contextlib.contextmanager
def failures_named(config: Config, folder: Path) -> Iterator[None]:
    """What stops a run while it trains says where the run is, how far it came, and the cure."""
    try:
        yield
    except FloatingPointError as error:
        cure = f"--lr_init is {config.lr_init:g}, the run is {folder}"
        raise FloatingPointError(f"{error} ({cure})") from error
    except OSError as error:
        saved = train.latest_step(folder / "checkpoints")
        since = "has no saved state yet" if saved is None else f"is saved up to step {saved}"
        told = f"{error.strerror or error}; the run {folder} {since}; the same command goes on"
        raise OSError(error.errno, told, error.filename) from error


def place_of(config: Config) -> tuple[str, str, str]:
    """Where the run's folder is: runs_dir, experiment, name."""
    return config.runs_dir, "resnet_cifar", run_name(config)


def run_name(config: Config) -> str:
    """Runs of one experiment that differ in what the paper varies get folders of their own."""
    return (
        f"{config.exp_name}-{config.dataset}-{config.model}-w{config.model_width}"
        f"-lr{config.lr_init:g}-{config.lr_schedule}-seed{config.seed}"
        + f"-fork{config.fork_step}"
        * bool(config.fork_from)
    )


def go_on(config: Config, parts: Parts, folder: Path, asked: Asked) -> None:
    """Trains from the newest saved state, or from the beginning, to the last step.

    Raises Stopped, with the state saved, where a signal has `asked` for it.
    """
    mesh = train.data_mesh()
    init_key, fit_key = jr.split(jr.key(config.seed))
    pixels, test_pixels = placed(parts.images, mesh), placed(parts.test_images, mesh)
    segment, sampler, fresh = training(config, parts, mesh, pixels)
    about = {k: v for k, v in dataclasses.asdict(config).items() if k not in MAY_CHANGE}
    pauses = hosts.Pauses(config.save_every_seconds, asked)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(
            train.open_checkpoints(folder / "checkpoints", keep=config.keep)
        )
        kept = config.save_model_each_k_epochs and stack.enter_context(
            train.open_checkpoints(folder / "models", keep=None)
        )
        fresh_state = train.replicate(fresh(init_key), mesh)
        state, beside = starting_state(config, checkpoints, fresh_state, about)
        on_row, on_call = stack.enter_context(recording(config, parts, folder, int(state.step)))

        def save(state: TrainState, window: train.Window) -> None:
            train.save(checkpoints, state, about, {"window": window._asdict()})
            pauses.saved()

        ended = train.fit(
            fit_key,
            state,
            sampler,
            segment,
            num_steps=parts.num_steps,
            eval_every=parts.eval_every,
            evaluate=gauges.evaluation(config, parts, mesh, fetch(pixels), fetch(test_pixels)),
            on_row=on_row,
            save=save,
            keep_every=config.save_model_each_k_epochs * parts.steps_per_epoch,
            keep=lambda state: keep(kept, state, about),
            steps_per_call=steps_per_call(config),
            on_call=on_call,
            pause=pauses,
            start=config.fork_step,
            window=train.Window(**beside.get("window", {})),
        )
        at = int(ended.step)
    if at < parts.num_steps:
        raise Stopped(
            f"{asked.name or 'Another host'}: stopped at step {at} of {parts.num_steps}; {folder} "
            "has all of it, and the same command goes on."
        )
    if hosts.is_first():
        records.finish_manifest(folder, steps=parts.num_steps)


def starting_state(
    config: Config, checkpoints: Any, fresh: TrainState, about: Mapping[str, Any]
) -> tuple[TrainState, dict[str, Any]]:
    """The newest state of this run, else that of the run it forks from, else `fresh`."""
    if config.fork_from and not checkpoints.all_steps():
        state = train.fork(config.fork_from, config.fork_step, fresh)
        train.save(checkpoints, state, about)  # the other run may go on and drop it
        checkpoints.wait_until_finished()
        return state, {}
    state, beside = train.restore(checkpoints, fresh, about)
    train.assert_room(checkpoints, state)  # now, and not at the first save
    return state, beside


@contextlib.contextmanager
def recording(
    config: Config, parts: Parts, folder: Path, done: int
) -> Iterator[tuple[Callable[[dict[str, Any]], None], Callable[[int], None]]]:
    """Who hears of rows and of steps: files, bar and board of process 0; nobody elsewhere."""
    if not hosts.is_first():
        yield lambda row: None, lambda step: None
        return
    # The state a run begins with was saved, if at all, without its row: that row comes anew.
    records.drop_rows_after(folder, done if done > config.fork_step else -1)
    records.start_manifest(
        folder,
        seed=config.seed,
        devices=[f"{device.platform}:{device.device_kind}" for device in jax.devices()],
        from_step=done,
        processes=jax.process_count(),
        **({"parent": parent_of(config)} if config.fork_from else {}),
    )
    board = folder / "tensorboard" if config.tensorboard else None
    live = progress.Live(done, parts.num_steps, config.batch_size, board)

    def on_row(row: dict[str, Any]) -> None:
        whole = completed(config, parts, row)
        records.append_row(folder, whole)
        live.on_row(whole)

    try:
        yield on_row, live.on_call
    finally:
        live.close()


def parent_of(config: Config) -> dict[str, Any]:
    """Which state of which run this one forks from, and the settings that differ: [its, ours]."""
    path = Path(config.fork_from).expanduser().absolute() / "config.json"
    its = records.read_json(path) if path.exists() else {}
    ours = {k: v for k, v in dataclasses.asdict(config).items() if k not in MAY_CHANGE}
    changed = {k: [its[k], v] for k, v in ours.items() if k in its and its[k] != v}
    return {"run": str(path.parent), "step": config.fork_step, "changed": changed}


def validate(config: Config) -> None:
    """Raises ValueError, in the words of the flags, for what can't be run; touches nothing."""
    bounds: dict[str, tuple[Callable[[Any], bool], str]] = {}
    for names, inside, words in BOUNDS:
        bounds |= dict.fromkeys(names.split(), (inside, words))
    for name, (inside, words) in bounds.items():
        value = getattr(config, name)
        if not inside(value):
            raise ValueError(f"--{name} is {value}; it must be {words}.")
    for name in ("batch_size", "batch_size_eval"):
        if getattr(config, name) % jax.device_count():
            raise ValueError(
                f"--{name} is {getattr(config, name)}, which can't be split over "
                f"{jax.device_count()} devices; choose a multiple of {jax.device_count()}."
            )
    if config.dataset not in data.IMAGE_SETS:
        known = ", ".join(sorted(data.IMAGE_SETS))
        raise ValueError(f"Unknown data set {config.dataset!r} (--dataset); known are {known}.")
    if config.p_label_noise and config.noise_type == "asym" and colour(config) not in CONFUSIONS:
        known = ", ".join(CONFUSIONS)
        raise ValueError(
            f"--noise_type=asym says what a class is mistaken for; of {config.dataset} nobody has "
            f"said it. It is known of {known}; or take --noise_type=sym."
        )
    if bool(config.fork_from) != bool(config.fork_step):
        raise ValueError("--fork_from RUN and --fork_step K go together.")
    if config.fork_from and config.model_path:
        raise ValueError("--fork_from and --model_path both say where to begin; choose one.")
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise ValueError(
            "--tensorboard needs the package tensorboardX: pip install it, or leave the flag out."
        )
    network(config, classes=2)
    schedules_of(config, steps_per_epoch=1)


positive = lambda value: 0 < value < math.inf
share = lambda value: 0 <= value <= 1
BOUNDS: Sequence[tuple[str, Callable[[Any], bool], str]] = (
    ("model_width epochs batch_size batch_size_eval", lambda n: n >= 1, "1 or more"),
    ("sparsity_images bn_images", lambda n: n >= 1, "1 or more"),
    ("eval_iter_freq n_final_eval", lambda n: n >= 1 or n == -1, "1 or more, or -1"),
    ("max_steps steps_per_call save_model_each_k_epochs fork_step", lambda n: n >= 0, "0 or more"),
    ("keep", lambda n: n >= 1, "1 or more"),
    ("save_every_seconds", lambda value: value >= 0, "0 or more"),
    ("jacobian_examples seed", lambda n: n >= 0, "0 or more"),
    ("l2_reg", lambda value: 0 <= value < math.inf, "0 or more"),
    ("lr_init warmup_factor warmup_exp jacobian_tol", positive, "positive"),
    ("momentum", lambda value: 0 <= value < 1, "in [0, 1), below 1"),
    ("swa_tau droprate", lambda value: 0 <= value < 1, "in [0, 1)"),
    ("frac_train", lambda value: 0 < value <= 1, "in (0, 1]"),
    ("p_label_noise sgd_p_label_noise", share, "in [0, 1]"),
)


def assemble(config: Config) -> Parts:
    """Opens the data and checks the flags against them."""
    whole, test = (
        data.load_images(config.dataset, split, data_dir=config.data_dir or None)
        for split in ("train", "test")
    )
    classes = len(whole.class_names)
    n = int(config.frac_train * len(whole.images))
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
        CONFUSIONS[colour(config)] if config.noise_type == "asym" else None,
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
    tx = optimizer(config, parts.schedules.step_size)
    step = train.make_step(parts.model, train.cross_entropy, tx, ema_decay=config.swa_tau)
    noise = data.uniform_label_noise(parts.schedules.label_noise, len(parts.images.class_names))
    segment = train.make_segment(
        step,
        fetch(pixels, augmentation(config)),
        shard=train.split_examples(mesh),
        unroll=1,
        noise=noise if config.sgd_p_label_noise else None,
    )
    sampler = train.reshuffled_epochs(len(parts.images.images), config.batch_size)
    x = jnp.zeros((1, *parts.images.images.shape[1:]), jnp.float32)

    @jax.jit
    def fresh(key):
        state = train.init_state(key, parts.model, tx, x, averaged=True)
        if parts.weights is None:
            return state
        params, stats = parts.weights
        return state._replace(params=params, stats=stats, average=params)

    return segment, sampler, fresh


def placed(images: data.Images, mesh: jax.sharding.Mesh) -> Batch:
    """A data set, as it is stored, on every device."""
    arrays: Any = (np.asarray(images.images), np.asarray(images.labels))
    return Batch(*train.replicate(arrays, mesh))


def fetch(pixels: Batch, augment: Callable | None = None):
    """Gathers from a data set on the device; bytes come out as floats in [0, 1]."""

    def gather(key, idx):
        x = pixels.x[idx]
        x = augment(key, x) if augment else x
        return Batch(x.astype(jnp.float32) / 255 if x.dtype == jnp.uint8 else x, pixels.y[idx])

    return gather


def augmentation(config: Config) -> Callable | None:
    """Crops and flips where the released code has them."""
    if config.no_data_augm or colour(config) in UNAUGMENTED:
        return None
    return partial(data.crop_and_flip, flip=colour(config) not in UNFLIPPED)


def colour(config: Config) -> str:
    """The data set that a grey-scale variant comes from."""
    return config.dataset.removesuffix("_gs")


def steps_per_call(config: Config) -> int:
    """Convolutions inside a compiled loop are 16-29 times slower on CPUs (jax issue 12868)."""
    return config.steps_per_call or (1 if jax.default_backend() == "cpu" else 25)


def keep(states: Any, state: TrainState, about: dict[str, Any]) -> None:
    """Saves a state for good, unless a run that was cut has done so before."""
    if int(state.step) not in states.all_steps():
        train.save(states, state, about)


def completed(config: Config, parts: Parts, row: dict[str, Any]) -> dict[str, Any]:
    """A row with epoch, step size and speed; without times where two runs are to be the same."""
    step = row["step"]
    place = {
        "step": step,
        "epoch": step / parts.steps_per_epoch,
        "lr": np.asarray(parts.schedules.step_size(step)),
    }
    if "step_seconds" in row:
        place["images_per_second"] = config.batch_size / row["step_seconds"]
    left_out = TIMES if config.deterministic else ()
    return {name: value for name, value in (place | row).items() if name not in left_out}
