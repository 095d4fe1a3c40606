"""Pallas kernels of alaya_jax, one folder for each operation."""
