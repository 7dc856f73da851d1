"""How JAX is set up before an experiment computes anything."""

import os

import jax

FIXED_ORDER = "--xla_gpu_deterministic_ops=true"


def set_up_toys(cpu_devices: int | None = None) -> None:
    """Float64, and `cpu_devices` (one per core), or the accelerators that are there.

    Before the first JAX computation of the process; afterwards it has no effect.
    """
    jax.config.update("jax_num_cpu_devices", cpu_devices or os.cpu_count() or 1)
    jax.config.update("jax_enable_x64", True)


def set_up_deep(*, deterministic: bool) -> None:
    """Where asked for, GPUs sum in a fixed order; CPUs and TPUs always do.

    Before the first JAX computation of the process; afterwards it has no effect.
    """
    flags = os.environ.get("XLA_FLAGS", "")
    if deterministic and FIXED_ORDER not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {FIXED_ORDER}".strip()
