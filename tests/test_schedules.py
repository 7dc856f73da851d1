import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sgd_sparse_jax.train import (
    exponential_warmup,
    piecewise_decay,
    power_warmup,
    released_schedule,
    schedules,
)

STEPS_PER_EPOCH, EPOCHS, LR = 195, 100, 0.75
EXPONENTS = (0.5, 1.0, 1.05)


def formula(name: str, k: int, factor: float, w: float) -> float:
    """The paper's page of formulas, in plain floats: t in epochs, one branch after the other."""
    t, total = (k + 1) / STEPS_PER_EPOCH, EPOCHS
    if name == "constant":
        return LR
    if name == "piecewise" or name[10:] in ("10_100", "3_9", "3_inf"):
        first, second = map(float, (name[10:] or "10_100").split("_"))
        return LR / (1 if t / total < 0.5 else first if t / total < 0.75 else second)
    if name == "cosine":
        return LR * (0.5 + 0.5 * math.cos(math.pi * t / total))
    if name == "inverted_cosine":
        return LR - LR * (0.5 + 0.5 * math.cos(math.pi * t / total))
    if name == "cyclic":
        top = 2 * total / 5
        return LR * (t / top if t < top else (total - t) / (total - top))
    f = int(name.removeprefix("piecewise_0")[0]) / 10
    over = 10 if t / total < 0.9 else 100
    if w > 1:
        return LR * w ** (100 * t / total) if t / total < f else LR * w ** (100 * f) / over
    if w < 1:
        warm = LR * (1 + (100 * t / total) ** w)
        return warm if t / total < f else LR * (1 + (100 * f) ** w) / over
    peak = factor * LR
    if t / total < f:
        return LR + (peak - LR) * t / (total / 2)
    reached = LR + (peak - LR) * f / 0.5 if name.endswith("clean") else f / 0.5 * peak
    return reached / over


@pytest.mark.parametrize("name", sorted(schedules.RELEASED))
def test_released_schedules_at_every_step(name):
    steps = jnp.arange(STEPS_PER_EPOCH * EPOCHS, dtype=jnp.int32)
    for w in EXPONENTS:
        for factor in (1.0, 5.0):
            schedule = released_schedule(
                name,
                LR,
                steps_per_epoch=STEPS_PER_EPOCH,
                epochs=EPOCHS,
                warmup_factor=factor,
                warmup_exp=w,
            )
            expected = np.array([formula(name, k, factor, w) for k in range(len(steps))])
            np.testing.assert_allclose(jax.vmap(schedule)(steps), expected, rtol=1e-12, atol=1e-15)
            with jax.enable_x64(False):
                single = released_schedule(
                    name,
                    LR,
                    steps_per_epoch=STEPS_PER_EPOCH,
                    epochs=EPOCHS,
                    warmup_factor=factor,
                    warmup_exp=w,
                )
                low = np.asarray(jax.jit(jax.vmap(single))(jnp.arange(len(expected))))
            assert low.dtype == np.float32
            # A drop one step early or late would be off by a factor of 10.
            np.testing.assert_allclose(low, expected, rtol=1e-4, atol=1e-7)


def test_the_released_decay_at_a_tenth_drops_fifty_fold_and_the_clean_one_tenfold():
    at = lambda name: float(released_schedule(name, 1.0, steps_per_epoch=10, epochs=10)(50))
    assert at("piecewise_01epochs") == pytest.approx(1 / 50)
    assert at("piecewise_01epochs_clean") == pytest.approx(1 / 10)
    assert at("piecewise_05epochs") == at("piecewise_05epochs_clean") == pytest.approx(1 / 10)


@pytest.mark.parametrize("name", ["piecewise_03epochs", "cosine", "cyclic"])
def test_every_number_of_a_released_schedule_vmaps(name):
    def value(lr, per_epoch, epochs, factor, w, step):
        return released_schedule(
            name, lr, steps_per_epoch=per_epoch, epochs=epochs, warmup_factor=factor, warmup_exp=w
        )(step)

    rows = [(0.1, 10, 20, 1.0, 0.5, 30), (0.2, 7, 30, 3.0, 1.0, 60), (0.3, 5, 40, 2.0, 1.1, 150)]
    columns = [jnp.asarray(column) for column in zip(*rows, strict=True)]
    looped = [value(*row) for row in rows]
    np.testing.assert_allclose(jax.jit(jax.vmap(value))(*columns), looped, rtol=1e-12)


def test_gradients_do_not_leak_from_other_regimes():
    def value(w):
        schedule = released_schedule(
            "piecewise_05epochs", 0.1, steps_per_epoch=10, epochs=10, warmup_exp=w
        )
        return schedule(20)

    for w in (0.5, 1.05):
        slope = (value(w + 1e-6) - value(w - 1e-6)) / 2e-6
        np.testing.assert_allclose(jax.grad(value)(w), slope, rtol=1e-5)


def test_warmups_and_decays_compose_and_vmap():
    def value(step_size, boundary, factor, step):
        warm = exponential_warmup(step_size, 1.05, 1000)
        return piecewise_decay(warm, [boundary, 900], [factor, 10.0])(step)

    grid = [(0.1, 500, 4.0, 499), (0.1, 500, 4.0, 500), (0.2, 300, 2.0, 950), (0.2, 300, 2.0, 0)]
    expected = [
        0.1 * 1.05**49.9,
        0.1 * 1.05**50 / 4,
        0.2 * 1.05**30 / 20,
        0.2,
    ]
    columns = [jnp.asarray(column) for column in zip(*grid, strict=True)]
    np.testing.assert_allclose(jax.vmap(value)(*columns), expected, rtol=1e-12)
    power = power_warmup(0.04, 5.0, 0.5, 1000)
    np.testing.assert_allclose(power(250), 0.04 * (1 + 5 * 0.5), rtol=1e-12)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(ValueError, match=r"'piecewise_04epochs'; known are constant, cosine, "):
        released_schedule("piecewise_04epochs", 0.1, steps_per_epoch=1, epochs=1)


@pytest.mark.parametrize("total", [1000, 1000.0])  # JAX divides an int32 by 1000 in float32
def test_an_integer_step_and_python_numbers_give_double_precision(total):
    steps = np.arange(0, 1000, 7)
    t = steps / 1000
    power, exponential = power_warmup(0.04, 5.0, 0.3, total), exponential_warmup(0.1, 1.03, total)
    decayed = piecewise_decay(power, [301.0, 798.0], [3.3, 7.7])
    held = 0.04 * (1 + 5 * np.minimum(t, 0.301) ** 0.3)
    expected = [
        (power, 0.04 * (1 + 5 * t**0.3)),
        (exponential, 0.1 * 1.03 ** (100 * t)),
        (decayed, held / np.where(steps < 301, 1, 3.3) / np.where(steps < 798, 1, 7.7)),
    ]
    for schedule, values in expected:
        for count in (schedule, jax.jit(schedule)):
            rows = [count(jnp.asarray(step, jnp.int32)) for step in steps]
            assert {row.dtype for row in rows} == {np.dtype(np.float64)}
            np.testing.assert_allclose(rows, values, rtol=1e-15)
