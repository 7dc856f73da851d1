"""Configuration of JAX, before an experiment computes anything."""

import contextlib
import os
from importlib import metadata

import jax

from experiments.launch import cli

QUICK_COMPILATION = {"xla_backend_optimization_level": 1}  # options of jax.jit
FIXED_ORDER = "--xla_gpu_deterministic_ops=true"
# On CPUs, compiles loops over small arrays as single functions, with the same results bit for bit,
SMALL_LOOPS = "--xla_backend_extra_options=xla_cpu_small_while_loop_byte_threshold=1000000000"
# and convolution-kernel gradients without YNNPACK, 1.8 to 2.9 times faster (docs/fast.md for both).
KERNEL_GRADIENTS = "--xla_cpu_experimental_ynn_fusion_type=-individual_convolution"
DEFAULTS = {  # results don't depend on JAX_... variables in the environment
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_numpy_dtype_promotion": "standard",
}


def set_up_toys(cpu_devices: int | None = None, *, small: bool = True) -> None:
    """Sets the number of CPU devices (default: one per core); for `small` nets float64 and loops.

    Devices chosen by the user, or of a JAX that has started, stay: only the speed depends on them.
    """
    _update(jax_enable_x64=small, **DEFAULTS)
    add_xla_flag(SMALL_LOOPS if small else KERNEL_GRADIENTS)
    named = jax.config.jax_num_cpu_devices > 0  # pyright: ignore[reportAttributeAccessIssue]
    # The older way is --xla_force_host_platform_device_count.
    if cpu_devices or not (named or "device_count" in os.environ.get("XLA_FLAGS", "")):
        with contextlib.suppress(RuntimeError):
            _update(jax_num_cpu_devices=cpu_devices or cores())


def set_up_deep(*, deterministic: bool) -> None:
    """Sets XLA's flags; `deterministic`: GPUs sum in a fixed order, as CPUs and TPUs always do.

    Call it before JAX starts, when XLA reads its flags; ValueError if JAX has started GPUs without
    the flag of `deterministic`.
    """
    _update(**DEFAULTS)
    add_xla_flag(KERNEL_GRADIENTS)
    if deterministic and FIXED_ORDER not in os.environ.get("XLA_FLAGS", ""):
        if has_started() and jax.default_backend() == "gpu":
            raise ValueError(
                f"--deterministic: JAX has started without {FIXED_ORDER} in XLA_FLAGS; start a new "
                "Python process, or set it in the environment."
            )
        add_xla_flag(FIXED_ORDER)


def has_started() -> bool:
    """Whether JAX has started its devices, after which XLA ignores new flags."""
    before = jax.config.jax_num_cpu_devices  # pyright: ignore[reportAttributeAccessIssue]
    try:
        _update(jax_num_cpu_devices=before + 1)  # JAX refuses changes once it has started
    except RuntimeError:
        return True
    _update(jax_num_cpu_devices=before)
    return False


def add_xla_flag(flag: str) -> None:
    """Adds a flag to XLA_FLAGS, unless it is set already or this jaxlib may not know it."""
    present = os.environ.get("XLA_FLAGS", "")
    # XLA aborts at unknown flags, and later versions may drop one.
    version = tuple(map(int, metadata.version("jaxlib").split(".")[:2]))
    known = flag == FIXED_ORDER or (0, 10) <= version <= (0, 12)
    if known and flag.partition("=")[0] not in present:
        os.environ["XLA_FLAGS"] = f"{present} {flag}".strip()


def start() -> None:
    """Starts JAX; raises ValueError without a driver, or with a bad JAX_PLATFORMS."""
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"JAX can't start ({cli.describe(error)}); JAX_PLATFORMS is "
            f"{os.environ.get('JAX_PLATFORMS', '')!r}; cpu always works."
        ) from error


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _update(**options: object) -> None:
    for name, value in options.items():
        jax.config.update(name, value)
