"""How JAX is set up before an experiment computes anything."""

import logging
import os

import jax

from experiments.launch import cli

FIXED_ORDER = "--xla_gpu_deterministic_ops=true"
DEFAULTS = {  # a run's numbers don't depend on the JAX_... variables of its user
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_numpy_dtype_promotion": "standard",
}


def set_up_toys(cpu_devices: int | None = None) -> None:
    """Float64, and on CPUs as many devices: by default what the user has set, or one per core.

    Once JAX has started its devices stay, with a warning: only the speed depends on them.
    """
    _update(jax_enable_x64=True, **DEFAULTS)
    chosen = _cpu_devices() > 0 or "device_count" in os.environ.get("XLA_FLAGS", "")
    if cpu_devices or not chosen:
        try:
            _update(jax_num_cpu_devices=cpu_devices or cores())
        except RuntimeError:
            message = "JAX has started already: the run has its %d device(s), not one per core."
            logging.getLogger(__name__).warning(message, jax.device_count())


def set_up_deep(*, deterministic: bool) -> None:
    """With `deterministic`, GPUs sum in a fixed order; CPUs and TPUs always do.

    XLA reads its flags when JAX starts: raises ValueError where GPUs have started without this one.
    """
    _update(**DEFAULTS)
    flags = os.environ.get("XLA_FLAGS", "")
    if deterministic and FIXED_ORDER not in flags:
        if has_started() and jax.default_backend() == "gpu":
            raise ValueError(
                f"--deterministic: JAX has started without XLA_FLAGS={FIXED_ORDER}; set it before, "
                "or run the command in a process of its own."
            )
        os.environ["XLA_FLAGS"] = f"{flags} {FIXED_ORDER}".strip()


def start() -> None:
    """Starts JAX; raises ValueError where it can't, for want of a driver or a bad JAX_PLATFORMS."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        platforms = f"JAX_PLATFORMS is {os.environ.get('JAX_PLATFORMS', '')!r}; cpu always works"
        raise ValueError(f"JAX can't start ({cli.describe(error)}); {platforms}.") from error


def has_started() -> bool:
    """Whether JAX has started its devices: then it refuses another number of those on CPUs.

    It has no public function that says so.
    """
    before = _cpu_devices()
    try:
        _update(jax_num_cpu_devices=1 if before != 1 else 2)
    except RuntimeError:
        return True
    _update(jax_num_cpu_devices=before)
    return False


def cores() -> int:
    """The cores that this process may use: on a cluster, not all that there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu_devices() -> int:
    return jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]


def _update(**options: object) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
