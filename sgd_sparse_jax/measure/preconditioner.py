"""Curvature in the metric of an adaptive optimizer."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from sgd_sparse_jax.types import Params

from .operators import Operator


def preconditioned(operator: Operator, scale: Params) -> Operator:
    """v -> D A D v with D = diag(scale): curvature in the metric of an adaptive optimizer.

    With scale = P^(-1/2) it has the eigenvalues of P^(-1) A; RMSProp with step size eta is at its
    edge where eta lambda_max reaches 2. Source: Cohen et al., 2022 (arXiv 2207.14484).

    Args:
        operator: A, of the loss.
        scale: One positive number per parameter, as of `adaptive_scale`.

    Example:
        >>> A = Operator(lambda v: 2.0 * v, jnp.ones(2))
        >>> preconditioned(A, jnp.array([1.0, 3.0])).matvec(jnp.ones(2)).tolist()
        [2.0, 18.0]
    """
    times = lambda v: jax.tree.map(jnp.multiply, scale, v)
    return Operator(lambda v: times(operator.matvec(times(v))), operator.like, operator.coupled)


def adaptive_scale(
    opt_state: optax.OptState, *, eps: float = 1e-8, eps_root: float = 0.0, decay: float = 0.0
) -> Params:
    """P^(-1/2) with P = sqrt(nu / (1 - decay^t) + eps_root) + eps, the preconditioner of Adam.

    Args:
        opt_state: Of optax.adam, optax.rmsprop or another state with one `nu`: the running mean of
            squared gradients up to the last step.
        eps: Added to the root. For optax.rmsprop, which adds it inside: eps=0, eps_root=1e-8.
        eps_root: Added inside the root.
        decay: Decay of `nu` in optimizers that correct its bias, such as Adam (0.999); default: no
            correction.

    Raises:
        ValueError: If the state has no `nu` or several.

    Example:
        >>> state = optax.adam(0.1).init(jnp.zeros(2))
        >>> state = optax.tree.set(state, nu=jnp.array([1.0, 16.0]))
        >>> adaptive_scale(state, eps=0.0).tolist()
        [1.0, 0.5]
    """
    has_nu = lambda state: hasattr(state, "nu")  # schedules have a `count`, too
    found: Any = [state for state in jax.tree.leaves(opt_state, is_leaf=has_nu) if has_nu(state)]
    step: Any = optax.tree.get(found[0], "count") if decay and len(found) == 1 else 1.0
    if len(found) != 1 or step is None:
        raise ValueError(
            f"The optimizer's state has {len(found)} running means of squared gradients, `nu`; it "
            "must have one, with a `count` if `decay` isn't 0."
        )
    scale = lambda v: (jnp.sqrt(v / (1.0 - decay**step) + eps_root) + eps) ** -0.5
    return jax.tree.map(scale, found[0].nu)
