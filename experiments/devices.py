"""How JAX is set up before a toy experiment: float64, and a device per core."""

import os

import jax


def set_up_toys(cpu_devices: int | None = None) -> None:
    """Float64, and `cpu_devices` (one per core), or the accelerators that are there.

    Before the first JAX computation of the process; afterwards it has no effect.
    """
    jax.config.update("jax_num_cpu_devices", cpu_devices or os.cpu_count() or 1)
    jax.config.update("jax_enable_x64", True)
