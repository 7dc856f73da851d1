"""Optimizers of the paper's toy code that optax lacks, as transformations to chain with `sgd`.

Its weight decay of diagonal networks, theta <- (1 - rate) theta whatever the step size, is
`optax.chain(optax.sgd(step_size), optax.add_decayed_weights(-rate))`. In the other order, and with
a positive rate, the decay is that of the penalty rate/2 |theta|^2 in the loss.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import ArrayLike


def balancing(rate: ArrayLike, pair: tuple[str, str] = ("u", "v")) -> optax.GradientTransformation:
    """Per coordinate, shrinks the larger of |u|, |v| by 1 - rate and grows the other by 1 + rate.

    Chain it after `optax.sgd`. `pair` names two leaves of equal shape in the dict of parameters,
    which `update` needs as its third argument.

    Example:
        >>> params = {"u": jnp.array([2.0]), "v": jnp.array([1.0])}
        >>> updates, _ = balancing(0.1).update({"u": 0.0, "v": 0.0}, optax.EmptyState(), params)
        >>> updates["u"].round(3).tolist(), updates["v"].round(3).tolist()
        ([-0.2], [0.1])
    """

    def move(updates, params):
        moved = dict(updates)
        for one, other in (pair, pair[::-1]):
            larger = jnp.abs(params[one]) > jnp.abs(params[other])  # if equal, both grow: as there
            moved[one] = updates[one] - rate * params[one] * jnp.where(larger, 1.0, -1.0)
        return moved

    return optax.stateless(move)


def normalized_leaves() -> optax.GradientTransformation:
    """g_i / |g_i| for each leaf g_i of the gradient; unchanged if any of the norms is 0.

    Chain it before `optax.sgd` for the normalized gradient descent of the paper's toy code.
    `optax.normalize_by_update_norm` divides by the norm of the whole gradient instead.

    Example:
        >>> tx = optax.chain(normalized_leaves(), optax.sgd(0.5))
        >>> tx.update({"w": jnp.array([0.0, 3.0])}, tx.init({"w": jnp.zeros(2)}))[0]["w"].tolist()
        [-0.0, -0.5]
    """

    def normalize(updates, params=None):
        norms = jax.tree.map(jnp.linalg.norm, updates)
        # All or none, as in the paper's code: at v = 0 the gradient of u is 0.
        all_positive = jnp.stack([norm > 0 for norm in jax.tree.leaves(norms)]).all()
        scaled = lambda leaf, norm: leaf / jnp.where(all_positive, norm, 1.0)
        return jax.tree.map(scaled, updates, norms)

    return optax.stateless(normalize)
