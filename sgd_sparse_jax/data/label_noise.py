"""Label noise: wrong labels fixed for a whole run, or noise drawn anew for each batch."""

from collections.abc import Mapping
from fractions import Fraction

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Int32

from sgd_sparse_jax.types import Batch, Count, Noise, PRNGKey

_CONFUSIONS = {
    # truck -> automobile, bird -> airplane, cat <-> dog, deer -> horse
    "cifar10": {9: 1, 2: 0, 3: 5, 5: 3, 4: 7},
    "cifar100": {c: (c + 1) % 100 for c in range(100)},
    "svhn": {c: (c + 1) % 10 for c in range(10)},
}


def confusions(name: str) -> Mapping[int, int] | None:
    """The map from a class to the one it is confused with; None if the data set has none.

    Classes that are not in the map keep their labels. NAME_gs has the map of NAME.

    Example:
        >>> confusions("cifar10"), confusions("mnist")
        ({9: 1, 2: 0, 3: 5, 5: 3, 4: 7}, None)
    """
    return _CONFUSIONS.get(name.removesuffix("_gs"))


def share_of(n: int, share: float, name: str = "share") -> int:
    """floor(share * n) in decimal arithmetic: `int(0.29 * 50_000)` would be 14,499.

    Args:
        n: Number of examples.
        share: In [0, 1].
        name: What the share is called in the error message.

    Raises:
        ValueError: If `share` is outside [0, 1], or positive with a result of 0.

    Example:
        >>> share_of(50_000, 0.29), share_of(5, 0.5)
        (14500, 2)
    """
    # str returns the shortest decimal that rounds to this float, hence the one that was written.
    count = int(Fraction(str(share)) * n) if 0 <= share <= 1 else 0
    if share and not count:
        raise ValueError(f"{name} is {share}; for {n} examples it must be 0 or in [{1 / n:g}, 1].")
    return count


def gaussian_label_noise(scale: optax.Schedule) -> Noise:
    """y + scale(step) N(0, 1), independent for each label.

    Returns `noise(key, step, batch) -> batch`, for `train.make_segment(noise=...)`.

    Args:
        scale: Standard deviation as a function of the step; its values may be traced.

    Example:
        >>> noise = gaussian_label_noise(optax.constant_schedule(0.1))
        >>> noise(jr.key(0), 0, Batch(jnp.ones((4, 2)), jnp.zeros(4))).y.shape
        (4,)
    """

    def noise(key: PRNGKey, step: Count | int, batch: Batch) -> Batch:
        return Batch(batch.x, batch.y + scale(step) * jr.normal(key, batch.y.shape, batch.y.dtype))

    return noise


def uniform_label_noise(share: optax.Schedule, classes: int) -> Noise:
    """Resamples each label, with probability share(step), uniformly from all `classes`.

    The new label may equal the old one: with 10 classes, a share p makes 0.9 p of the labels wrong,
    as in the released code. Used like `gaussian_label_noise`.

    Args:
        share: Probability as a function of the step; its values may be traced.
        classes: Number of classes.

    Example:
        >>> noise = uniform_label_noise(lambda step: jnp.where(step < 5, 0.5, 0.0), 10)
        >>> noise(jr.key(0), 5, Batch(jnp.ones((3, 2)), jnp.arange(3))).y.tolist()
        [0, 1, 2]
    """

    def noise(key: PRNGKey, step: Count | int, batch: Batch) -> Batch:
        which, what = jr.split(key)
        chosen = jr.bernoulli(which, share(step), batch.y.shape)
        drawn = jr.randint(what, batch.y.shape, 0, classes, batch.y.dtype)
        return Batch(batch.x, jnp.where(chosen, drawn, batch.y))

    return noise


def corrupt_labels(
    labels: Int32[np.ndarray, " n"],
    share: float,
    classes: int,
    seed: int,
    confusions: Mapping[int, int] | None = None,
) -> Int32[np.ndarray, " n"]:
    """A copy of `labels` with `share_of(n, share)` of them wrong, uniform among the other classes.

    Args:
        labels: true labels [n].
        share: in [0, 1].
        classes: the number of classes.
        seed: determines, together with `n` and `share`, which examples are changed.
        confusions: replaces class c by confusions[c] (default c) instead of a random class.

    Example:
        >>> labels = np.zeros(10, np.int32)
        >>> corrupt_labels(labels, 0.3, 2, seed=0).sum().item()
        3
    """
    rng = np.random.default_rng(seed)
    # A prefix of a permutation: a larger share includes the examples of a smaller one.
    hit = rng.permutation(len(labels))[: share_of(len(labels), share, "share of wrong labels")]
    out = labels.copy()
    if confusions is None:
        out[hit] = (out[hit] + rng.integers(1, classes, len(hit))) % classes
    else:
        out[hit] = [confusions.get(int(label), int(label)) for label in labels[hit]]
    return out
