"""What optax lacks of the paper's toy optimizers; chain these behind or before `optax.sgd`."""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike


def shrinkage(rate: ArrayLike) -> optax.GradientTransformation:
    """theta <- (1 - rate) theta at every step, whatever the step size: put it behind `optax.sgd`.

    The paper's weight decay of diagonal nets. The usual one, that of the loss's gradient, is
    `optax.add_decayed_weights(rate)` before `optax.sgd`.
    """

    def update(updates, state, params=None):
        shrunk = lambda update, leaf: update - rate * leaf
        return jax.tree.map(shrunk, updates, _given(params)), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def balancing(rate: ArrayLike, pair: tuple[str, str] = ("u", "v")) -> optax.GradientTransformation:
    """Per coordinate, the larger of |u|, |v| shrinks by 1 - rate and the other grows by 1 + rate.

    Put it behind `optax.sgd`. `pair` names the two leaves of the parameters, of equal shape; where
    they are equal both grow, as in the paper's code.
    """

    def update(updates, state, params=None):
        params = _given(params)
        missing = [name for name in pair if name not in params]
        if missing:
            raise ValueError(f"balancing: no leaf {missing} in {sorted(params)}; give its pair.")
        moved = dict(updates)
        for one, other in (pair, pair[::-1]):
            larger = jnp.abs(params[one]) > jnp.abs(params[other])
            moved[one] = updates[one] - rate * params[one] * jnp.where(larger, 1.0, -1.0)
        return moved, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def normalized_leaves() -> optax.GradientTransformation:
    """Each leaf of the gradient over its own norm, unless one of the norms is 0: then as it is.

    Put it before `optax.sgd`: normalized GD of the paper's toy code. For the norm of the whole
    gradient there is `optax.normalize_by_update_norm`.
    """

    def update(updates, state, params=None):
        norms = jax.tree.map(jnp.linalg.norm, updates)
        all_positive = jnp.stack([norm > 0 for norm in jax.tree.leaves(norms)]).all()
        scaled = lambda leaf, norm: leaf / jnp.where(all_positive, norm, 1.0)
        return jax.tree.map(scaled, updates, norms), state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _given(params):
    if params is None:
        raise ValueError("This transform moves the parameters themselves: tx.update(…, params).")
    return params
