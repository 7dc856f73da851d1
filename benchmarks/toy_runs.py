"""The run of a toy network that the benchmarks time and compile."""

from collections.abc import Callable, Sequence
from typing import Any

import optax

from experiments.toy import problems
from sgd_sparse_jax import Batch, train


def make_run(toy: problems.Toy, steps: int, probes: Sequence[train.Probe] = ()) -> Callable:
    """(key, step_size) -> (final state, records) of single-example SGD, as a user would write it.

    The run includes drawing the order of examples.
    """
    network, examples = toy.network(1.0), toy.train

    def run(key: Any, step_size: Any) -> tuple[Any, tuple]:
        tx = optax.sgd(step_size)
        step = train.make_step(train.make_objective(network, toy.loss), tx)
        fetch = lambda key, idx: Batch(examples.x[idx], examples.y[idx])
        state = train.init_state(key, network, tx, examples.x)
        sampler = train.with_replacement(len(examples.y), 1)
        segment = train.make_segment(step, fetch)
        return train.record_run(key, sampler, segment, state, probes, steps)

    return run
