"""The flags of a run that trains an image classifier, and their allowed values."""

import dataclasses
import importlib.util
import math
from pathlib import Path
from typing import Annotated, Literal

import jax

from experiments.launch import ranges
from experiments.launch.hosts import ALONE, Hosts
from experiments.storage import records
from sgd_sparse_jax import data

MAY_CHANGE = (  # between starts of a run: results do not depend on these flags
    *("max_steps", "save_every_seconds", "keep", "data_dir", "runs_dir", "debug", "tensorboard"),
    "hosts",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """Trains an image classifier as the paper's deep experiments do."""

    dataset: str = "cifar10"
    """cifar10, cifar100, svhn, mnist, fashion_mnist, tiny_imagenet, cifar10_horse_car,
    cifar10_dog_cat, gaussians_binary or uniform_noise; NAME_gs for grey-scale; path:FOLDER for your
    own images (see sgd_sparse_jax.data.load_images)."""
    frac_train: ranges.PositiveShare = 1.0
    """Share of the training set to use, from its beginning."""
    p_label_noise: ranges.Share = 0.0
    """Share of wrong training labels, fixed throughout training."""
    noise_type: Literal["sym", "asym"] = "sym"
    """Wrong labels: sym (uniform over the other classes) or asym (by a map of confusions)."""
    sgd_p_label_noise: ranges.Share = 0.0
    """Share of each batch's labels that are resampled at every step, uniformly over all classes."""
    ln_schedule: str = "constant"
    """Schedule of sgd_p_label_noise; names as for lr_schedule."""
    no_data_augm: bool = False
    """Train without random crops and flips."""
    model: str = "resnet18_plain"
    """Network: resnet18_plain (the paper's), resnet18, resnet18_gn, resnet34 or resnet34_plain (one
    network), resnet34_gn, resnet34preact, resnet_tiny, resnet_tiny_gn, wrn28, vgg16 or
    densenet100_12."""
    model_width: ranges.Count = 64
    """Channels of the first stage; widening factor of wrn28, growth rate of densenet100_12."""
    half_prec: bool = False
    """Compute in bfloat16; parameters, BatchNorm moments and loss stay in float32."""
    droprate: ranges.Fraction = 0.0
    """Dropout rate inside the blocks of pre-activation networks."""
    softplus: ranges.CountOrNone = 0
    """Beta of softplus in place of ReLU in pre-activation networks (0: ReLU)."""
    model_path: str = ""
    """Initialize from the weights of this run folder, or of one of its saved states."""
    epochs: ranges.Count = 100
    """Length of the run and of its schedules."""
    batch_size: ranges.Count = 128
    """Examples per step, over all devices."""
    lr_init: ranges.Positive = 0.1
    """Initial step size."""
    lr_schedule: str = "piecewise"
    """Step-size schedule of the released code: constant, piecewise_05epochs, cosine, ...; all names
    are in sgd_sparse_jax.train.released_schedule."""
    warmup_factor: ranges.Positive = 1.0
    """Peak of the linear warm-up, as a multiple of lr_init."""
    warmup_exp: ranges.Positive = 1.0
    """Above 1: base of the exponential warm-up; below 1: power of the polynomial one."""
    momentum: ranges.Fraction = 0.9
    """Heavy-ball momentum."""
    l2_reg: ranges.NonNegative = 0.0
    """λ of the penalty λ/2 |p|² on all parameters, added to the training loss."""
    swa_tau: ranges.Fraction = 0.999
    """Decay of the moving average of the weights, updated at every step."""
    eval_iter_freq: ranges.CountOrAll = -1
    """Steps between evaluations, each followed by a checkpoint; -1: every 5 epochs."""
    batch_size_eval: ranges.Count = 512
    """Images per evaluation batch."""
    n_final_eval: ranges.CountOrAll = 10_000
    """Test images per evaluation (-1: all)."""
    sparsity_images: ranges.Count = 10_752
    """Training images per evaluation of loss, error and sparsity (default: 21 batches of 512)."""
    bn_images: ranges.Count = 5120
    """Training images for BatchNorm moments of the averaged weights; all after the last epoch."""
    jacobian_examples: ranges.CountOrNone = 0
    """Training images for the rank of the Jacobian, in float64 (0: off; slow above 50)."""
    jacobian_tol: ranges.Positive = 1e-4
    """Singular values above this multiple of the largest count for the rank."""
    curvature_every: ranges.CountOrNone = 0
    """Steps between records of curvature, a multiple of the steps between evaluations, whose rows
    they join; also at the first and last evaluation (0: never)."""
    curvature_examples: ranges.Count = 512
    """Training images whose Hessian is measured: of the cross-entropy, without augmentation."""
    curvature_mode: Literal["train", "eval"] = "train"
    """BatchNorm in records of curvature: train (moments of the batch, all images at once in memory)
    or eval (running moments, images in parts)."""
    curvature_eigenvalues: Annotated[int, ranges.Range(1, 20, "[]")] = 1
    """Number of largest eigenvalues of the Hessian."""
    save_model_each_k_epochs: ranges.CountOrNone = 0
    """Keep the state of every k-th epoch under models/ (0: the newest checkpoints only)."""
    max_steps: ranges.CountOrNone = 0
    """Stop after this step (0: after all epochs); run again with a larger value to continue."""
    save_every_seconds: Annotated[float, ranges.Range(0, math.inf, "[]")] = 300.0
    """Seconds between checkpoints, in addition to those at evaluations (0: after every call)."""
    keep: ranges.Count = 2
    """Number of newest checkpoints to keep."""
    fork_from: str = ""
    """Run folder to fork: start from one of its saved states, with other flags."""
    fork_step: ranges.CountOrNone = 0
    """Step of that state; steps count from there."""
    steps_per_call: ranges.CountOrNone = 0
    """Steps in one compiled call (0: 1 on CPUs, 25 on accelerators)."""
    deterministic: bool = False
    """Byte-for-byte reproducible metrics: omit times, and sum in a fixed order on GPUs."""
    seed: ranges.Seed = 0
    """Seed of initialization, order of examples, augmentation and label noise."""
    exp_name: str = "other"
    """Name of the experiment, the prefix of the run folder's name."""
    data_dir: str = ""
    """Folder of the data (default: TFDS_DATA_DIR, else ~/tensorflow_datasets)."""
    runs_dir: str = "runs"
    """Folder that contains the run folders."""
    tensorboard: bool = False
    """Also write metrics for TensorBoard, under tensorboard/ in the run's folder."""
    debug: bool = False
    """Stop at the first operation that returns NaN, with a traceback (slow)."""
    hosts: Hosts = ALONE


def folder_of(config: Config) -> Path:
    """The run's folder, named after the settings that the paper varies and the step of a fork."""
    lr = repr(float(config.lr_init)).removesuffix(".0")  # all digits, to distinguish close values
    dataset = Path(config.dataset.removeprefix(data.PATH)).absolute().name
    name = (
        f"{config.exp_name}-{dataset}-{config.model}-w{config.model_width}"
        f"-lr{lr}-{config.lr_schedule}-seed{config.seed}"
    )
    fork = f"-fork{config.fork_step}" if config.fork_from else ""
    return records.run_folder(config.runs_dir, "resnet_cifar", name + fork)


def of_folder(folder: Path) -> Config:
    """The flags of the run in `folder`; ValueError if there is none."""
    path = folder / "config.json"
    if not path.exists():
        raise ValueError(f"{folder} has no config.json; give a run folder of resnet_cifar.")
    saved = records.read_json(path)
    names = [field.name for field in dataclasses.fields(Config) if field.name != "hosts"]
    return Config(**{name: saved[name] for name in names if name in saved})


def check(config: Config) -> None:
    """Raises ValueError for flags that are out of range or contradict each other or the devices."""
    ranges.check(config)
    devices = jax.device_count()
    curvature = ("curvature_examples",) if config.curvature_every else ()
    for name in ("batch_size", "batch_size_eval", *curvature):
        if getattr(config, name) % devices:
            raise ValueError(
                f"--{name} is {getattr(config, name)}; choose a multiple of {devices}, the number "
                "of devices."
            )
    needs_map = config.p_label_noise and config.noise_type == "asym"
    if needs_map and data.confusions(config.dataset) is None:
        known = ", ".join(name for name in data.IMAGE_SETS if data.confusions(name))
        raise ValueError(
            f"--noise_type=asym needs a confusion map; available for {known}, not for "
            f"{config.dataset}."
        )
    if bool(config.fork_from) != bool(config.fork_step):
        raise ValueError("--fork_from RUN and --fork_step K go together.")
    if config.fork_from and config.model_path:
        raise ValueError("--fork_from and --model_path both set the initial weights; choose one.")
    if config.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise ValueError("--tensorboard needs the package tensorboardX: install it.")
