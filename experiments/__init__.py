"""The commands: compose, run, record, plot. Run from the repository, not installed."""

import importlib.metadata
import os

# The wrong numbers of jax issue 39103 look like right ones: better no results than such.
broken = importlib.metadata.version("jaxlib") == "0.10.2"
if broken and not os.environ.get("SGD_SPARSE_ALLOW_JAXLIB"):
    raise SystemExit(
        "error: jaxlib 0.10.2 computes wrong numbers on CPUs; pip install 'jax!=0.10.2' "
        "'jaxlib!=0.10.2' (SGD_SPARSE_ALLOW_JAXLIB=1 uses it all the same)."
    )

# `import jax` raises for other values, before a command could catch it.
BOOLEANS = ("0", "1", "false", "true", "no", "yes", "off", "on")
if (x64 := os.environ.get("JAX_ENABLE_X64", "0")).lower() not in BOOLEANS:
    raise SystemExit(f"error: JAX_ENABLE_X64 is {x64!r}; set it to 0 or 1, or unset it.")

# One XLA device per core calls LAPACK on its own, and a thread pool of OpenBLAS in each makes
# singular values three times slower. OpenBLAS reads this when JAX is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
