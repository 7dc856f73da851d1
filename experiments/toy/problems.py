"""The paper's toy problems: data, networks and metrics."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import ArrayLike

from experiments.launch import devices
from sgd_sparse_jax import data, measure
from sgd_sparse_jax.models import MLP, DiagonalNet, from_linen, gaussian, rademacher
from sgd_sparse_jax.train import half_squared, squared
from sgd_sparse_jax.types import Batch, LossFn, Network, Params, Scalar

SUPPORT_THRESHOLD, DIAGONAL_RANK_TOL = 1e-50, 1e-15  # in float64
RANK_TOL = 1e-4

MakeNetwork = Callable[[ArrayLike], Network]  # from the scale of its initialization


def sweep_options(*, alone: bool) -> dict[str, Any]:
    """Options of `train.make_sweep` on the default backend; `alone`: CPUs don't vmap the runs."""
    if jax.default_backend() != "cpu":
        return {}
    # Compilation takes longer than the default runs.
    options: dict[str, Any] = {"compiler_options": devices.QUICK_COMPILATION}
    return options | ({"vectorized": 1} if alone else {})


class Toy(NamedTuple):
    """A toy problem: everything that a sweep over schedules and seeds does not vary."""

    train: Batch
    test: Batch
    network: MakeNetwork
    loss: LossFn
    watch: Callable[[Params, Params], dict]  # metrics (initial, current), of every record
    spectra: Callable[[Params], dict]  # metrics from singular values, of some records
    # In the original, the step size decays after the boundary step for diagonal nets, before it for
    # fully connected nets.
    decay_after_step: bool
    alone_on_cpus: bool = False  # whether runs are faster there one by one than vmapped

    @property
    def sweep_options(self) -> dict[str, Any]:
        """`sweep_options` for this problem."""
        return sweep_options(alone=self.alone_on_cpus)

    def predict(self, params: Params, x: ArrayLike) -> jax.Array:
        """f(x) for each row of x."""
        return self.network(1.0).apply(params, {}, jnp.asarray(x)).out

    def mean_loss(self, params: Params, batch: Batch) -> Scalar:
        """The loss over all of `batch`."""
        return self.loss(self.predict(params, batch.x), batch.y).mean()

    def measure(self, initial: Params, params: Params) -> dict:
        """Both losses and the metrics of `watch`."""
        losses = {
            "train_loss": self.mean_loss(params, self.train),
            "test_loss": self.mean_loss(params, self.test),
        }
        return losses | self.watch(initial, params)


def diagonal(*, n: int, d: int, support: int, data_seed: int = 0, alpha: float = 0.1) -> Toy:
    """D1-D3: sparse regression with f(x) = <u * v, x>."""
    drawn = data.sparse_regression(data_seed, n=n, d=d, support=support)
    # The Jacobian's singular values need only R of X = QR: half the rows, factored once.
    r = jnp.asarray(np.linalg.qr(drawn.test.x[: min(2 * d, 1000)], mode="r"))

    def watch(initial: Params, params: Params) -> dict:
        u, v = params["u"], params["v"]
        return {
            "support": measure.support_size(u, v, SUPPORT_THRESHOLD),
            "balancedness": measure.balancedness(u, v),
        }

    def spectra(params: Params) -> dict:
        jacobian = measure.diagonal_net_jacobian(r, params["u"], params["v"])
        return {"rank": measure.numerical_rank(jacobian, DIAGONAL_RANK_TOL)}

    network = lambda scale: from_linen(DiagonalNet(alpha * scale))
    how = {"decay_after_step": True, "alone_on_cpus": True}
    return Toy(*_batches(drawn), network, half_squared, watch, spectra, **how)


def regression_1d() -> Toy:
    """F1, F2: twelve points on a line, 100 ReLUs; w1 = +-2.5, b1 = 2.5 N(0, 1), w2 = 4 N(0, 1)."""
    units = 100
    network = lambda scale: from_linen(
        MLP(
            (units,),
            biases=(True, False),
            kernel_init=(rademacher(2.5 * scale), gaussian(4.0 * scale)),
            bias_init=gaussian(2.5 * scale),
        )
    )
    train, test = _batches(data.regression_1d())
    distinct = partial(measure.distinct_units, corr_threshold=0.999)
    features = _watch_features(network, train, corr_threshold=0.999)

    def watch(initial: Params, params: Params) -> dict:
        predict = lambda p, x: network(1.0).apply(p, {}, x).out
        rows = measure.jacobian(predict, params, train.x)
        rows = rows.reshape(len(rows), 3, units)  # bias, weight, outgoing weight
        dimension = measure.gradient_dimension(distinct, rows)
        return {"gradient_dimension": dimension} | features(initial, params)

    low, high = float(train.x.min()), float(train.x.max())
    # As many points as parameters: fewer would bound the rank of the Jacobian.
    points = jnp.linspace(low, high, 3 * units)[:, None]
    spectra = _two_layer_spectra(network, train, points)
    return Toy(train, test, network, squared, watch, spectra, decay_after_step=False)


def two_layer() -> Toy:
    """T1: teacher-student on the circle, 20 ReLUs, weights N(0, .5^2) and 0, no biases."""
    network = lambda scale: from_linen(
        MLP((20,), biases=False, kernel_init=(gaussian(0.5 * scale), gaussian(0.0)))
    )
    train, test = _batches(data.teacher_student(1, n=15))
    watch = _watch_features(network, train)
    spectra = _two_layer_spectra(network, train, test.x[:60])  # the number of parameters
    return Toy(train, test, network, squared, watch, spectra, decay_after_step=False)


def three_layer() -> Toy:
    """T3: teacher-student in five dimensions, 10 + 10 ReLUs, N(0, .8^2), torch's default biases."""
    network = lambda scale: from_linen(MLP((10, 10), kernel_init=gaussian(0.8 * scale)))
    train, test = _batches(data.teacher_student(6, n=50, teacher=data.DEEP_TEACHER))
    points = test.x[:181]  # the number of parameters

    def spectra(params: Params) -> dict:
        apply = network(1.0).apply
        rows = measure.jacobian(lambda p, x: apply(p, {}, x).out, params, points)
        features = apply(params, {}, points).features
        last = measure.unit_rows(list(features.values())[-1])
        return {
            "rank": measure.numerical_rank(rows, RANK_TOL),
            "effective_rank": measure.effective_rank(measure.singular_values(last)),
        }

    watch = _watch_features(network, train)
    return Toy(train, test, network, squared, watch, spectra, decay_after_step=False)


PROBLEMS: dict[str, Callable[[], Toy]] = {
    "diagonal": partial(diagonal, n=80, d=200, support=20),
    "diagonal-small": partial(diagonal, n=40, d=100, support=20),
    "diagonal-plane": partial(diagonal, n=20, d=30, support=3),
    "1d": regression_1d,
    "two-layer": two_layer,
    "three-layer": three_layer,
}


def _batches(drawn: data.Problem) -> tuple[Batch, Batch]:
    as_batch = lambda examples: Batch(jnp.asarray(examples.x), jnp.asarray(examples.y))
    return as_batch(drawn.train), as_batch(drawn.test)


def _watch_features(network: MakeNetwork, train: Batch, *, corr_threshold: float = 0.99):
    """Per hidden layer: share of active units, feature sparsity, ReLUs flipped since the start."""

    def watch(initial: Params, params: Params) -> dict:
        features = lambda params: network(1.0).apply(params, {}, train.x).features.values()
        seen: dict = {}
        for layer, (phi, before) in enumerate(
            zip(features(params), features(initial), strict=True), 1
        ):
            # Signed: the paper's code counts nonzero entries here, positive ones in deep nets.
            seen[f"active_{layer}"], seen[f"sparsity_{layer}"] = measure.feature_sparsity(
                measure.unit_rows(phi), corr_threshold, signed=True
            )
            seen[f"flips_{layer}"] = measure.relu_flips(before, phi)
        return seen

    return watch


def _two_layer_spectra(network: MakeNetwork, train: Batch, points: jax.Array):
    """Jacobian rank at `points`; nuclear norm of the features times their outgoing weights."""

    def spectra(params: Params) -> dict:
        first, outgoing = params["layer1"], params["layer2"]["kernel"][:, 0]
        rows = measure.two_layer_jacobian(points, first["kernel"], outgoing, first.get("bias"))
        phi = network(1.0).apply(params, {}, train.x).features["layer1"]
        scaled = measure.singular_values(phi * outgoing[None])
        return {
            "rank": measure.numerical_rank(rows, RANK_TOL),
            "nuclear_norm": measure.schatten_sum(scaled),
        }

    return spectra
