"""Label noise of a batch, drawn anew at every step: `make_segment(…, noise=…)` takes it."""

import jax.random as jr
import optax

from sgd_sparse_jax._types import Batch, Count, Noise, PRNGKey


def gaussian_label_noise(scale: optax.Schedule) -> Noise:
    """y + scale(step) N(0, 1), independent for each label of the batch; scale 0 changes nothing."""

    def noise(key: PRNGKey, step: Count, batch: Batch) -> Batch:
        drawn = jr.normal(key, batch.y.shape, batch.y.dtype)
        return Batch(batch.x, batch.y + scale(step) * drawn)

    return noise
