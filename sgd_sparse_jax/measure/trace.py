"""Traces and spectral densities of linear maps, from products with random vectors."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sgd_sparse_jax.types import PRNGKey

from .eigenpairs import project_out
from .estimates import FEWEST, Estimate, mean_estimate
from .operators import Operator, dimension, generator, on_host


def trace(
    operator: Operator, key: PRNGKey, *, probes: int = 100, sketch: int = 0, tol: float = 0.0
) -> Estimate:
    """tr A = E z^T A z over vectors z of random signs, with its standard error.

    The variance of one sample is 2 (|A|_F^2 - sum_i A_ii^2). With `sketch`, the trace on the range
    of A Omega, for a random Omega, is computed exactly and only the remainder is sampled, which
    takes fewer products if few eigenvalues dominate. Sources: Hutchinson, 1990; Hutch++, Meyer et
    al., 2021.

    Args:
        operator: A, symmetric.
        key: Of the random vectors.
        probes: Largest number of samples, one product each.
        sketch: Columns of Omega, two products each (default: none).
        tol: Relative standard error at which sampling stops (default: after all probes).

    Raises:
        ValueError: If there are no probes, or `sketch` exceeds the number of parameters.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> A = Operator(lambda v: jnp.arange(4.0) * v, jnp.zeros(4))
        >>> trace(A, jax.random.key(0), probes=2).value  # exact, because A is diagonal
        6.0
    """
    rng, product, size = generator(key), on_host(operator), dimension(operator)
    if not 0 <= sketch <= size or probes < 1:
        raise ValueError(
            f"sketch is {sketch}, probes {probes}; give a sketch from 0 to {size}, the number of "
            "parameters, and at least 1 probe."
        )
    rows = np.zeros((0, size))
    if sketch:
        rows = np.linalg.qr(np.stack([product(v) for v in rng.normal(size=(sketch, size))]).T)[0].T
    exact, samples = sum(float(row @ product(row)) for row in rows), []
    while True:
        z = project_out(rng.choice([-1.0, 1.0], size), rows)[1]
        samples.append(exact + float(z @ product(z)))
        found = mean_estimate(np.array(samples), tol if len(samples) >= FEWEST else 0.0)
        if found.converged or len(samples) >= probes:
            return found


class Density(NamedTuple):
    """A spectral density (1/p) sum_i delta(lambda - lambda_i), as one quadrature rule per probe.

    `moment(n)` is tr A^n / p. `smoothed(grid, width)` is the density convolved with a Gaussian:
    values and standard errors on the grid. Errors are those of a sample of `probes` out of p
    orthogonal directions, hence zero for p probes.

    Example:
        >>> density = Density(np.array([[1.0, 3.0]]), np.array([[0.5, 0.5]]), size=9)
        >>> density.moment(2).value
        5.0
    """

    nodes: Float[np.ndarray, "probes steps"]  #: of the quadrature, approximate eigenvalues
    weights: Float[np.ndarray, "probes steps"]  #: sum to 1 for each probe
    size: int  #: p, the dimension

    def moment(self, order: int) -> Estimate:
        found = mean_estimate((self.weights * self.nodes**order).sum(1))
        return found._replace(standard_error=found.standard_error * self._unseen())

    def smoothed(
        self, grid: Float[np.ndarray, " g"], width: float
    ) -> tuple[Float[np.ndarray, " g"], Float[np.ndarray, " g"]]:
        bell = np.exp(-(((grid - self.nodes[..., None]) / width) ** 2) / 2)
        rows = (self.weights[..., None] * bell).sum(1) / (width * np.sqrt(2 * np.pi))
        spread = rows.std(0, ddof=1) if len(rows) > 1 else np.full(len(grid), np.nan)
        return rows.mean(0), spread / np.sqrt(len(rows)) * self._unseen()

    def _unseen(self) -> float:
        return float(np.sqrt(1 - len(self.nodes) / self.size))


def spectral_density(
    operator: Operator, key: PRNGKey, *, probes: int = 8, steps: int = 32
) -> Density:
    """(1/p) sum_i delta(lambda - lambda_i) of A, by stochastic Lanczos quadrature.

    It takes `probes` times `steps` products. Probes are random orthonormal vectors; for each, the
    moments up to 2 `steps` - 1 are exact. Vectors are reorthogonalized in float64. Sources: Ubaru
    et al., 2017; Ghorbani et al., 2019 (arXiv 1901.10159).

    Args:
        operator: A, symmetric.
        key: Of the random vectors.
        probes: Number of start vectors, at most p; standard errors need two or more.
        steps: Lanczos steps from each start vector.

    Raises:
        ValueError: If `probes` or `steps` is out of range.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> A = Operator(lambda v: jnp.arange(4.0) * v, jnp.zeros(4))
        >>> density = spectral_density(A, jax.random.key(0), probes=4, steps=2)
        >>> round(density.moment(1).value, 6), density.moment(1).standard_error
        (1.5, 0.0)
    """
    product, size = on_host(operator), dimension(operator)
    if not 1 <= probes <= size or steps < 1:
        raise ValueError(
            f"probes = {probes}; give 1 to {size}, the number of parameters. steps = {steps}; give "
            "1 or more."
        )
    starts = np.linalg.qr(generator(key).normal(size=(size, probes)))[0].T
    nodes, weights = np.zeros((2, probes, min(steps, size)))
    for probe, v in enumerate(starts):
        V, M = np.zeros((nodes.shape[1], size)), np.zeros(2 * nodes.shape[1:])
        used, length = 0, 1.0
        # At an invariant subspace the quadrature rule is exact.
        while used < len(V) and length > 1e-14 * np.abs(M).max():
            V[used] = v / length
            M[: used + 1, used], v = project_out(product(V[used]), V[: used + 1])
            used, length = used + 1, np.linalg.norm(v)
        nodes[probe, :used], S = np.linalg.eigh(M[:used, :used], UPLO="U")
        weights[probe, :used] = S[0] ** 2
    return Density(nodes, weights, size)
