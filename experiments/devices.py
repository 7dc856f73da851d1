"""How JAX is set up before a toy experiment: float64, and a device per core."""

import os

import jax


def set_up_toys() -> None:
    """Float64, and one CPU device per core, or the accelerators that are there.

    Before the first JAX computation of the process; afterwards it has no effect.
    """
    jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)
    jax.config.update("jax_enable_x64", True)
