"""The Pallas kernels of alaya_jax, one folder per operation."""
