"""The commands, which run from the repository and are not installed."""

import importlib.metadata
import os

# jax issue 39103: the wrong results look plausible, so nothing is run.
broken = importlib.metadata.version("jaxlib") == "0.10.2"
if broken and not os.environ.get("SGD_SPARSE_ALLOW_JAXLIB"):
    raise SystemExit(
        "error: jaxlib 0.10.2 computes wrong numbers on CPUs; pip install 'jax!=0.10.2' "
        "'jaxlib!=0.10.2' (SGD_SPARSE_ALLOW_JAXLIB=1 overrides)."
    )

# `import jax` raises for other values, before a command can catch the error.
BOOLEANS = ("0", "1", "false", "true", "no", "yes", "off", "on")
if (x64 := os.environ.get("JAX_ENABLE_X64", "0")).lower() not in BOOLEANS:
    raise SystemExit(f"error: JAX_ENABLE_X64 is {x64!r}; set it to 0 or 1, or unset it.")

# With one XLA device per core, a thread pool of OpenBLAS in each makes singular values three times
# slower. OpenBLAS reads this when JAX is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
