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

# One XLA device per core calls LAPACK on its own, and a thread pool of OpenBLAS in each makes
# singular values three times slower. OpenBLAS reads this when JAX is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
