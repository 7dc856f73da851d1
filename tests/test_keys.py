"""No random number is used twice: each key draws once, and no key is derived from one that drew.

The runs use a PRNG implementation that records its calls on the host. As in JAX, `split(key)[i]` is
`fold_in(key, i)`, so that deriving both appears as a key that draws twice.
"""

import math
from collections import Counter

import jax
import jax.numpy as jnp
import jax.random as jr
import numpy as np
import pytest
from jax.extend.random import define_prng_impl

from sgd_sparse_jax import data, train
from sgd_sparse_jax.types import Batch, TrainState

DRAWS, PARENTS = Counter(), set()
N, B, STEPS = 6, 4, 3


def on_host(shape, dtype, function, key, *number):
    """function(key, *number), an array, for each key where the call is vmapped."""

    def call(keys, *numbers):
        rows = zip(np.reshape(keys, (-1, 2)).tolist(), *map(np.ravel, numbers), strict=True)
        results = [function(tuple(key), *map(int, number)) for key, *number in rows]
        return np.array(results, dtype).reshape((*np.shape(keys)[:-1], *shape))

    like = jax.ShapeDtypeStruct(shape, dtype)
    return jax.pure_callback(call, like, key, *number, vmap_method="broadcast_all")


def child(key, number):
    PARENTS.add(key)
    return np.random.SeedSequence([*key, number]).generate_state(2)


def split(key, shape):
    children = lambda key: [child(key, i) for i in range(math.prod(shape))]
    return on_host((*shape, 2), np.uint32, children, key)


def bits(key, width, shape):
    def draw(key):
        DRAWS[key, shape] += 1
        return np.random.default_rng(key).integers(0, 2**width, shape, f"uint{width}")

    return on_host(shape, f"uint{width}", draw, key)


NOTING = define_prng_impl(
    key_shape=(2,),
    seed=lambda seed: jnp.zeros(2, jnp.uint32),
    split=split,
    fold_in=lambda key, number: on_host((2,), np.uint32, child, key, number),
    random_bits=bits,
    name="noting",
    tag="noting",
)


def draws_of(run):
    """Counts the draws of `run(key)` by (key, shape). Each key has a single shape."""
    DRAWS.clear(), PARENTS.clear()
    jax.block_until_ready(jax.jit(run)(jr.key(0, impl=NOTING)))
    keys = [key for key, _ in DRAWS]
    assert len(keys) == len(set(keys))
    assert not PARENTS & set(keys)
    return Counter(DRAWS)


IMAGES = jnp.asarray(np.random.default_rng(0).random((N, 3, 3, 1)))


def adding_up(state, batch):
    """A step that depends on the whole batch and compiles quickly."""
    total = batch.x.sum() + batch.y.sum()
    return state._replace(step=state.step + 1, params=state.params + total), total


def start(key):
    return TrainState(jnp.array(0, jnp.int32), jr.normal(key, ()), {}, (), ())


CROPS = lambda key, idx: Batch(data.crop_and_flip(key, IMAGES[idx]), idx % 3)
BLUR = lambda key, idx: Batch(jr.normal(key, (B, N)), 1.0 * idx)
HALF = lambda step: 0.5


@pytest.mark.parametrize(
    ("sampler", "fetch", "noise", "per_step"),
    [  # two words for corners; flips, coins and two words for new labels
        (train.reshuffled_epochs, CROPS, data.uniform_label_noise(HALF, 3), {(B, 2): 2, (B,): 4}),
        (train.with_replacement, BLUR, data.gaussian_label_noise(HALF), {(B, N): 1, (B,): 1}),
    ],
)
def test_keys_of_a_recorded_run(sampler, fetch, noise, per_step):
    """Between records, windows of the order are redrawn with their own keys."""
    segment = train.make_segment(adding_up, fetch, noise=noise)

    def run(key):
        initial, running = jr.split(key)
        probe = train.Probe(lambda state: state.step, [0, 2])
        return train.record_run(running, sampler(N, B), segment, start(initial), [probe], STEPS)

    draws = draws_of(run)
    for shape, n in per_step.items():
        assert [count for (_, of), count in draws.items() if of == shape] == [1] * (n * STEPS)


def test_a_key_used_twice_is_detected():
    with pytest.raises(AssertionError):
        draws_of(lambda key: (jr.normal(jr.fold_in(key, 1)), jr.normal(jr.split(key)[1], (3,))))
