"""The sentences: compose, run, record, plot. Run from the repository, not installed."""

import os

# One XLA device per core calls LAPACK on its own: a thread pool of OpenBLAS beside them makes
# singular values three times slower. It is read when JAX is imported.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
