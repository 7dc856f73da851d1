"""JAX at its strictest: silent broadcasting is an error, eight devices, both precisions at hand."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
