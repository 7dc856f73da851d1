"""Wrong labels: of a data set once, or of a batch anew at every step (`make_segment(noise=…)`)."""

from collections.abc import Mapping

import jax.numpy as jnp
import jax.random as jr
import numpy as np
import optax
from jaxtyping import Int32

from sgd_sparse_jax.types import Batch, Count, Noise, PRNGKey

# What each class is mistaken for; the others stay (truck -> automobile, bird -> airplane, cat <->
# dog, deer -> horse).
CIFAR10_CONFUSIONS = {9: 1, 2: 0, 3: 5, 5: 3, 4: 7}


def gaussian_label_noise(scale: optax.Schedule) -> Noise:
    """y + scale(step) N(0, 1), independent for each label of the batch; scale 0 changes nothing."""

    def noise(key: PRNGKey, step: Count, batch: Batch) -> Batch:
        drawn = jr.normal(key, batch.y.shape, batch.y.dtype)
        return Batch(batch.x, batch.y + scale(step) * drawn)

    return noise


def uniform_label_noise(share: optax.Schedule, classes: int) -> Noise:
    """Each label, with probability share(step), drawn anew among all `classes`.

    A label that is drawn anew may come out as it was: a share p of 10 classes is wrong 0.9 p of
    the time, as in the released code. Share 0 changes nothing.
    """

    def noise(key: PRNGKey, step: Count, batch: Batch) -> Batch:
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
    """int(share n) labels made wrong, for the whole run: uniform among the other classes.

    With `confusions`, class c becomes confusions[c] where it has one and else stays. Which
    examples are hit depends on `seed` alone. Raises ValueError for a share outside [0, 1] or where
    one class leaves no other.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"The share of wrong labels is {share}; choose one in [0, 1].")
    if classes < 2 and share:
        raise ValueError(f"With {classes} class no label can be made wrong.")
    rng = np.random.default_rng(seed)
    hit = rng.permutation(len(labels))[: int(share * len(labels))]
    out = labels.copy()
    if confusions is None:
        out[hit] = (out[hit] + rng.integers(1, classes, len(hit))) % classes
    else:
        out[hit] = [confusions.get(int(label), int(label)) for label in labels[hit]]
    return out
