import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgd_sparse_jax import train
from sgd_sparse_jax.train.schedules import RELEASED

LR, NAMES = 0.75, sorted(RELEASED)


def formula(name, k, per_epoch, total, factor, w):
    """The paper's formulas at the steps k; boundaries are compared as integers."""
    t = (k + 1) / per_epoch / total
    before = lambda tenths: 10 * (k + 1) < tenths * per_epoch * total
    if name == "constant":
        return LR * np.ones_like(t)
    if name == "piecewise" or name[10:] in ("10_100", "3_9", "3_inf"):
        first, second = map(float, (name[10:] or "10_100").split("_"))
        return LR / np.select([before(5), before(7.5)], [1, first], second)
    if name == "cosine":
        return LR * (0.5 + 0.5 * np.cos(np.pi * t))
    if name == "inverted_cosine":
        return LR - LR * (0.5 + 0.5 * np.cos(np.pi * t))
    if name == "cyclic":
        return LR * np.where(before(4), t / 0.4, (1 - t) / 0.6)
    tenths = int(name.removeprefix("piecewise_0")[0])
    f, over = tenths / 10, np.where(before(9), 10, 100)
    if w > 1:
        return LR * np.where(before(tenths), w ** (100 * t), w ** (100 * f) / over)
    if w < 1:
        warm = lambda t: 1 + (100 * t) ** w
        return LR * np.where(before(tenths), warm(t), warm(f) / over)
    rising = lambda t: LR + (factor * LR - LR) * t / 0.5
    reached = rising(f) if name.endswith("clean") else f / 0.5 * factor * LR
    return np.where(before(tenths), rising(t), reached / over)


@pytest.mark.parametrize("double", [True, False])
def test_released_schedules_at_every_step(double):
    """All parameters are vmapped. A decay one step early or late would be off by a factor of 10."""
    grid = [(7, 30, 5.0, 0.5), (195, 100, 1.0, 1.0), (10, 13, 5.0, 1.0), (39, 50, 5.0, 1.05)]
    k = np.arange(195 * 100)
    with jax.enable_x64(double):

        @jax.jit
        def values(per_epoch, epochs, factor, w):
            shape = {"steps_per_epoch": per_epoch, "epochs": epochs}
            warmup = {"warmup_factor": factor, "warmup_exp": w}
            return [jax.vmap(train.released_schedule(n, LR, **shape, **warmup))(k) for n in NAMES]

        rows = jax.vmap(values)(*map(jnp.asarray, zip(*grid, strict=True)))
    assert {row.dtype for row in rows} == {np.dtype(np.float64 if double else np.float32)}
    close = {"rtol": 1e-12, "atol": 1e-15} if double else {"rtol": 1e-4, "atol": 1e-7}
    for name, row in zip(NAMES, rows, strict=True):
        for point, actual in zip(grid, row, strict=True):
            steps = point[0] * point[1]
            expected = formula(name, k[:steps], *point)
            np.testing.assert_allclose(actual[:steps], expected, **close, err_msg=f"{name} {point}")


@pytest.mark.parametrize("total", [1000, 1000.0])  # JAX divides an int32 by 1000 in float32
def test_an_integer_step_and_python_numbers_give_double_precision(total):
    steps = np.arange(0, 1000, 7)
    t = steps / 1000
    power, exponential = (
        train.power_warmup(0.04, 5.0, 0.3, total),
        train.exponential_warmup(0.1, 1.03, total),
    )
    decayed = train.piecewise_decay(power, [301.0, 798.0], [3.3, 7.7])
    held = 0.04 * (1 + 5 * np.minimum(t, 0.301) ** 0.3)
    expected = [
        0.04 * (1 + 5 * t**0.3),
        0.1 * 1.03 ** (100 * t),
        held / np.where(steps < 301, 1, 3.3) / np.where(steps < 798, 1, 7.7),
    ]
    of = lambda step: [schedule(step) for schedule in (power, exponential, decayed)]
    actual = jax.jit(jax.vmap(of))(jnp.asarray(steps, jnp.int32))
    assert {row.dtype for row in (*actual, *of(jnp.int32(7)))} == {np.dtype(np.float64)}
    np.testing.assert_allclose(actual, expected, rtol=1e-15)
    np.testing.assert_allclose(of(jnp.int32(7)), np.stack(expected)[:, 1], rtol=1e-15)
    assert train.piecewise_decay(lambda step: 3.0 * step, [], [])(7) == 21
